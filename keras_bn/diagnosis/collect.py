"""Reading a model's batch normalizations, and measuring them on data, into records.

Each batch goes through the model twice: once in inference, once with only the
normalizations in training. Copies of the layers do the work, so nothing in the model
changes.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from keras_bn.diagnosis.records import LayerRecord, MeasuredLayer, ModelRecord
from keras_bn.layer.arguments import align_mask
from keras_bn.moments import Moments, merged
from keras_bn.passes.observe import (
    NoDataError,
    Watch,
    batches,
    check_call,
    observed,
    pooled,
    state_kept,
)
from keras_bn.surgery.arrays import axes, float64, is_initial, moving
from keras_bn.surgery.graph import input_of
from keras_bn.surgery.norms import is_frozen, is_keras, is_normalization, normalizations
from keras_bn.surgery.view import ModelView
from keras_bn.tools.linear import is_activated, is_linear, linear

_INFERENCE, _TRAINING, _PROBE = "inference", "training", "probe"


def collect(model, data, *, steps=None, batch_size=None, verbose="auto"):
    """Run data through a model, and record the inputs of its normalizations.

    Args:
        model, data, steps, batch_size, verbose: as in `diagnose`.

    Returns:
        A `ModelRecord`.
    """
    check_call(model)
    layers = check_any(model)
    with _Run(model, layers) as run:
        run.over(data, steps=steps, batch_size=batch_size, verbose=verbose)
    held = {each.layer: each for each in _held(model, layers)}
    return ModelRecord(
        model=model.name,
        steps=_steps(model),
        layers=[_with_data(held[path], seen) for path, seen in run.seen.items()],
        samples=run.samples,
        batches=run.batches,
        not_called=tuple(path for path in layers if path not in run.seen),
        gap=run.gap.value,
        loss=run.loss.values,
        accuracy=run.accuracy.values,
    )


def read(model):
    """What a model holds, without data.

    Args:
        model: as in `diagnose`.

    Returns:
        A `ModelRecord`.
    """
    layers = _held(model, check_any(model))
    return ModelRecord(model=model.name, steps=_steps(model), layers=layers)


def check_any(model):
    """The normalizations of a model, by path; refuses one that has none."""
    if layers := normalizations(model):
        return layers
    raise ValueError(f"'{model.name}' has no batch normalization in it.")


class _Gap:
    """Collects the differences between outputs in training and in inference."""

    def __init__(self):
        self._squares = 0.0
        self._training = Moments(0.0, np.zeros(()), np.zeros(()))

    def add(self, inference, training):
        """Add two arrays of the elements that count."""
        if training.size:
            self._squares += float(np.square(training - inference).sum())
            new = Moments(float(training.size), training.mean(), training.var())
            self._training = merged(self._training, new, np)

    @property
    def value(self):
        count, _, variance = self._training
        if not count:
            return 0.0
        distance = np.sqrt(self._squares / count)
        return float(distance / (np.sqrt(variance) or 1.0))


class _Pair:
    """Collects the mean over samples of a value in inference and in training."""

    def __init__(self):
        self._sums, self._samples = np.zeros(2), 0

    def add(self, values, samples):
        self._sums += samples * np.asarray(values, "float64")
        self._samples += samples

    @property
    def values(self):
        if not self._samples:
            return None
        inference, training = self._sums / self._samples
        return float(inference), float(training)


@dataclass
class _Seen:
    """What was collected from the calls of one layer."""

    data: Moments | None = None
    elements: list[float] = field(default_factory=list)
    gap: _Gap = field(default_factory=_Gap)
    modes: set = field(default_factory=set)


class _Run(Watch):
    """Runs a model over data in both modes, with copies of its normalizations."""

    def __init__(self, model, layers):
        super().__init__(model, layers, self._answer)
        self._mode = _INFERENCE
        self._outputs: dict[str, list] = {}
        self.samples = self.batches = 0
        self.seen: dict[str, _Seen] = {}
        self.gap, self.loss, self.accuracy = _Gap(), _Pair(), _Pair()

    def over(self, data, **options):
        data = data if isinstance(data, tuple) else (data,)
        for x, y, sample_weight in batches(*data, **options):
            if not self.batches:
                with state_kept(self._model):
                    self._forward(x, _PROBE, training=True)
            self._step(x, y, sample_weight)
        if not self.samples:
            raise NoDataError

    def _step(self, x, y, sample_weight):
        samples = keras.tree.flatten(x)[0].shape[0]
        self.samples += samples
        self.batches += 1
        self._outputs = {}
        outputs, losses, accuracies = [], [], []
        for mode in _INFERENCE, _TRAINING:
            outputs.append(self._forward(x, mode))
            if y is not None:
                losses.append(_loss(self._model, x, y, outputs[-1], sample_weight))
                accuracies.append(_accuracy(y, outputs[-1]))
        for first, second in zip(*map(keras.tree.flatten, outputs), strict=True):
            self.gap.add(float64(first).ravel(), float64(second).ravel())
        for pair, values in ((self.loss, losses), (self.accuracy, accuracies)):
            if values and None not in values:
                pair.add(values, samples)

    def _forward(self, x, mode, training=False):
        self._mode = mode
        return self.run(x, training=training)

    def _answer(self, path, twin, inputs, training=None, mask=None):
        seen = self.seen.setdefault(path, _Seen())
        if self._mode == _PROBE:
            seen.modes.add(bool(training))
            return twin.call(inputs, training=False, mask=mask)
        if self._mode == _INFERENCE:
            y = twin.call(inputs, training=False, mask=mask)
            self._outputs.setdefault(path, []).append(y)
            return y
        _, moments = observed(path, twin, inputs, mask)
        samples = inputs.shape[0]
        group = twin.virtual_batch_size or samples
        seen.elements.append(
            float(moments.count.max()) * min(1.0, group / max(samples, 1))
        )
        seen.data = pooled(seen.data, moments)
        trains = seen.modes != {False}
        with state_kept(twin):
            y = twin.call(inputs, training=trains, mask=mask)
        before = self._outputs[path].pop(0)
        seen.gap.add(*(_counted(z, mask, twin) for z in (before, y)))
        return y


def _held(model, layers):
    """A `LayerRecord` of each layer, without data."""
    biases = dict(_idle_biases(model))
    records = []
    for path, layer in layers.items():
        mean, variance = moving(layer)
        frozen = is_frozen(layer)
        records.append(
            LayerRecord(
                layer=path,
                keras=is_keras(layer),
                epsilon=layer.epsilon,
                momentum=layer.momentum,
                debias=layer.momentum is None or getattr(layer, "debias", False),
                frozen=frozen,
                moving_mean=mean,
                moving_variance=variance,
                initial=is_initial(layer),
                gamma=None if layer.gamma is None else float64(layer.gamma),
                bias_of=None if frozen else biases.get(id(layer)),
            )
        )
    return records


def _with_data(record, seen):
    """The record of a layer with what its calls have shown."""
    count, mean, variance = seen.data
    inference_mode = seen.modes == {False}
    shown = {**vars(record), "inference_mode": inference_mode}
    if inference_mode:
        shown["bias_of"] = None
    return MeasuredLayer(
        **shown,
        data=Moments(np.broadcast_to(count, record.moving_mean.shape), mean, variance),
        elements=float(np.median(seen.elements)),
        gap=seen.gap.value,
    )


def _idle_biases(model):
    """Pairs of a normalization's `id` and the name of a layer whose bias it removes."""
    view = ModelView(model)
    for node in view.calls:
        norm = node.operation
        if not is_normalization(norm):
            continue
        tensor = input_of(node)
        producer = view.producer(tensor)
        if producer is None or view.is_output(tensor):
            continue
        layer = producer.operation
        alone = len(view.consumers(tensor)) == 1
        if alone and _has_bias_along(layer, norm.axis, len(tensor.shape)):
            yield id(norm), layer.name


def _has_bias_along(layer, axis, rank):
    if not is_linear(layer) or is_normalization(layer) or is_activated(layer):
        return False
    if isinstance(layer, keras.layers.EinsumDense) or isinstance(axis, list):
        return False
    return layer.bias is not None and axis % rank == linear(layer).channel_axis(rank)


def _steps(model):
    optimizer: Any = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return None
    return int(float64(optimizer.iterations)) or None


def _counted(values, mask, layer):
    """The elements that count under a mask, as a flat array."""
    values = float64(values)
    if mask is None:
        return values.ravel()
    mask = align_mask(mask, values, tuple(sorted(a % values.ndim for a in axes(layer))))
    return values[np.broadcast_to(keras.ops.convert_to_numpy(mask), values.shape)]


def _loss(model, x, y, outputs, sample_weight):
    """The loss of a batch, as in `evaluate`; None if the model has none."""
    if not getattr(model, "compiled", False):
        return None
    own = type(model).compute_loss is not keras.Model.compute_loss
    if model.loss is None and not model.losses and not own:
        return None
    # A loss of the user's gets tensors, as in `fit`.
    x, y, sample_weight = keras.tree.map_structure(
        lambda v: v if v is None else keras.ops.convert_to_tensor(v),
        (x, y, sample_weight),
    )
    arguments = {"x": x, "y": y, "y_pred": outputs, "sample_weight": sample_weight}
    if "training" in inspect.signature(model.compute_loss).parameters:
        arguments["training"] = False
    # Keras divides losses by the number of replicas, a loss of 1 as well.
    unit = keras.losses.MeanAbsoluteError()(np.ones((1, 1)), np.zeros((1, 1)))
    return float(float64(model.compute_loss(**arguments)) / float64(unit))


def _accuracy(y, outputs):
    """The share of samples with the right class; None if there are no classes."""
    if len(keras.tree.flatten(outputs)) > 1 or len(keras.tree.flatten(y)) > 1:
        return None
    y, outputs = float64(y), float64(outputs)
    if outputs.ndim != 2 or outputs.shape[1] < 2 or np.any(y % 1):
        return None
    if y.shape == outputs.shape:
        if np.any(y.sum(1) != 1) or np.any(y < 0):
            return None
        y = y.argmax(1)
    if y.size != len(outputs):
        return None
    return float(np.mean(y.ravel() == outputs.argmax(1)))
