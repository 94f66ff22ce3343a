"""Reading a model's batch normalizations, and measuring them on data, into records.

Each batch goes through the model twice: once in inference, once with only the
normalizations in training. What comes of activations, outputs and losses is reduced to
a few numbers where it is computed. Doubles of the layers do the work, so nothing in the
model changes.
"""

import inspect
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bn.diagnosis.records import LayerRecord, MeasuredLayer, ModelRecord
from keras_bn.layer.arguments import align_mask, channel_axes
from keras_bn.moments import Moments, at_least_float32, merged
from keras_bn.passes.compiled import Pass, Pool, moments_of
from keras_bn.passes.data import check_call
from keras_bn.passes.recorder import state_kept, with_values
from keras_bn.surgery.arrays import float64, is_initial, moving
from keras_bn.surgery.graph import input_of
from keras_bn.surgery.norms import (
    adapts,
    is_frozen,
    is_keras,
    is_normalization,
    normalizations,
)
from keras_bn.surgery.view import ModelView
from keras_bn.tools.linear import is_activated, is_linear, linear

_INFERENCE, _TRAINING, _PROBE = "inference", "training", "probe"
_ALONE = "training alone"  # there is nothing of inference to compare with


def read(model):
    """What a model holds, without data.

    Args:
        model: as in `diagnose`.

    Returns:
        A `ModelRecord`.
    """
    found = check_any(model)
    layers, trains = _held(model, found), _trains(model, found)
    for layer in layers:
        layer.inference_mode = not trains
    return ModelRecord(
        model=model.name, steps=_steps(model), layers=layers, trains=trains
    )


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

    def add(self, squares, training):
        """Add the sum of squares, and the `Moments` of the outputs in training."""
        if training.count:
            self._squares += float(squares)
            # Where gamma or beta is not finite, so are these.
            with np.errstate(invalid="ignore"):
                self._training = merged(self._training, training, np)

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


class Collector(Pass):
    """Runs data through a model in both modes, and records what comes of it.

    It can be used again after the model's weights have changed.

    Args:
        model: as in `diagnose`.
    """

    labelled = True

    def __init__(self, model):
        check_call(model)
        self.layers = check_any(model)
        super().__init__(model, self.layers)
        self._mode = _INFERENCE
        # By path, with which values of `training` the model calls a layer.
        self._trainings: dict[str, set] = {}
        self._outputs: dict[str, list] = {}
        self._flags = _flags(self.layers)

    def is_current(self):
        """Whether the model's normalizations are still those of this object."""
        return self._flags == _flags(normalizations(self.model))

    def collect(
        self, data, *, steps=None, batch_size=None, verbose="auto", compared=math.inf
    ):
        """Run data through the model, and record the inputs of its normalizations.

        Args:
            data, steps, batch_size, verbose: as in `diagnose`.
            compared: after how many samples the outputs in inference are enough, and
                only the statistics go on.

        Returns:
            A `ModelRecord`.
        """
        self._compared = compared
        self._pool, self._elements = Pool(), {}
        self._gaps = {path: _Gap() for path in self.layers}
        self._gap, self._loss, self._accuracy = _Gap(), _Pair(), _Pair()
        options = {"steps": steps, "batch_size": batch_size, "verbose": verbose}
        with self:
            self.over(data, "diagnosing", **options)
        self.check_any()
        records = {record.layer: record for record in _held(self.model, self.layers)}
        moments = self._pool.moments()
        order = [*self._trainings, *(p for p in moments if p not in self._trainings)]
        return ModelRecord(
            model=self.model.name,
            steps=_steps(self.model),
            trains=_trains(self.model, self.layers),
            layers=[
                self._with_data(records[path], moments[path])
                for path in order
                if path in moments
            ],
            samples=self.samples,
            batches=self.batches,
            invalid=self.invalid,
            first_invalid=self.first_invalid,
            of_one_class=self.labels.alone,
            not_called=tuple(path for path in self.layers if path not in moments),
            gap=self._gap.value,
            loss=self._loss.values,
            accuracy=self._accuracy.values,
        )

    def run(self, batch, given=(), step=None):
        if not self._trainings:
            self._probe(batch)
        if self.samples >= self._compared:
            step = self._statistics_step
        return super().run(batch, given, step)

    def _probe(self, batch):
        """Find out once which layers the model calls with `training=True`."""
        # Eagerly: it has to see values, and Keras makes the metrics of a loss now.
        with state_kept(self.model):
            self.eagerly(self._probe_step, *self.tensors(batch))

    def _probe_step(self, batch, given):
        self._mode = _PROBE
        # None is what a model gets that is called without.
        training = _trains(self.model, self.layers) or None
        outputs = self.forward(batch[0], training=training)
        if batch[1] is not None:
            _loss(self.model, batch[0], batch[1], outputs, batch[2])

    def step(self, batch, given):
        x, y, sample_weight = batch
        self._outputs = {}
        outputs = {}
        for self._mode in _INFERENCE, _TRAINING:
            outputs[self._mode] = self.forward(x)
            if y is None:
                continue
            loss = _loss(self.model, x, y, outputs[self._mode], sample_weight)
            if loss is not None:
                self.note("loss", self._mode, loss)
            hits = _hits(y, outputs[self._mode])
            if hits is not None:
                self.note("accuracy", self._mode, *hits)
        for pair in zip(*map(keras.tree.flatten, outputs.values()), strict=True):
            before, after = (_wide(value) for value in pair)
            squares = ops.sum(ops.square(after - before))
            self.note("output", None, squares, *_moments(after, None))

    def _statistics_step(self, batch, given):
        self._mode = _ALONE
        self.forward(batch[0])

    def record(self, path, double, inputs, training=None, mask=None):
        if self._mode == _PROBE:
            self._trainings.setdefault(path, set()).add(bool(training))
            return double.call(inputs, training=False, mask=mask)
        if self._mode == _INFERENCE:
            y = double.call(inputs, training=False, mask=mask)
            self._outputs.setdefault(path, []).append(y)
            return y
        y, moments = double.normalize_batch(inputs, mask)
        self.note("moments", path, *moments)
        trains = self._trainings.get(path) != {False}
        plain = not (double.renorm or double.virtual_batch_size or is_frozen(double))
        if not (plain and trains):
            with with_values(double):
                y = double.call(inputs, training=trains, mask=mask)
        if self._mode == _ALONE:
            return y
        before = self._outputs[path].pop(0)
        difference = _wide(y) - _wide(before)
        if mask is not None:
            axes = channel_axes(double.axis, y.shape, sizes_known=False)
            mask = align_mask(mask, y, axes)
            difference = ops.where(mask, difference, 0.0)
        self.note("gap", path, ops.sum(ops.square(difference)))
        if not (plain and trains):
            self.note("spread", path, *_moments(_wide(y), mask))
        return y

    def take(self, notes, batch, samples):
        self._pool.add(moments_of(notes))
        values: dict = {"loss": {}, "accuracy": {}}
        calls: dict = {"gap": {}, "spread": {}, "moments": {}}
        for kind, path, arrays in notes:
            if kind == "output":
                self._gap.add(arrays[0], _wide_moments(*arrays[1:]))
            elif kind in values:
                values[kind][path] = arrays
            else:
                calls[kind].setdefault(path, []).append(arrays)
        for path, parts in calls["moments"].items():
            spreads = calls["spread"].get(path)
            for i, moments in enumerate(parts):
                self._note_elements(path, moments[0], samples)
                if path not in calls["gap"]:
                    continue
                if spreads is None:
                    training = self._of_output(path, Moments(*moments))
                else:
                    training = _wide_moments(*spreads[i])
                self._gaps[path].add(calls["gap"][path][i][0], training)
        if len(values["loss"]) == 2:
            self._loss.add([float(v[0]) for v in values["loss"].values()], samples)
        if len(values["accuracy"]) == 2:
            hits, known = zip(*values["accuracy"].values(), strict=True)
            if all(known):
                self._accuracy.add([float(h) / samples for h in hits], samples)

    def _note_elements(self, path, count, samples):
        """How many elements the statistics of a batch in training rest on."""
        group = self.doubles[path].virtual_batch_size or samples
        share = min(1.0, group / max(samples, 1))
        self._elements.setdefault(path, []).append(float(np.max(count)) * share)

    def _of_output(self, path, moments):
        """The `Moments` of all of a layer's output, from those of its input."""
        double = self.doubles[path]
        count, _, variance = (np.asarray(part, "float64") for part in moments)
        count = np.broadcast_to(count, variance.shape)
        variance = variance / (variance + double.epsilon)
        if double.gamma is not None:
            variance = variance * float64(double.gamma) ** 2
        mean = np.zeros(()) if double.beta is None else float64(double.beta)
        mean = np.broadcast_to(mean, variance.shape)
        total = count.sum()
        if not total:
            return Moments(0.0, np.zeros(()), np.zeros(()))
        share = count / total
        with np.errstate(invalid="ignore"):  # of gamma and beta that are not finite
            centre = (share * mean).sum()
            spread = (share * (variance + (mean - centre) ** 2)).sum()
        return Moments(total, centre, spread)

    def _with_data(self, record, moments):
        """The record of a layer with what its calls have shown."""
        inference_mode = self._trainings.get(record.layer) == {False}
        shown = {**vars(record), "inference_mode": inference_mode}
        if inference_mode:
            shown["bias_of"] = None
        return MeasuredLayer(
            **shown,
            data=moments,
            elements=float(np.median(self._elements[record.layer])),
            gap=self._gaps[record.layer].value,
        )


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
                momentum=momentum_of(layer),
                debias=layer.momentum is None or getattr(layer, "debias", False),
                frozen=frozen,
                moving_mean=mean,
                moving_variance=variance,
                initial=is_initial(layer),
                gamma=None if layer.gamma is None else float64(layer.gamma),
                beta=None if layer.beta is None else float64(layer.beta),
                bias_of=None if frozen else biases.get(id(layer)),
                adapts=adapts(layer),
            )
        )
    return records


def momentum_of(layer):
    """The momentum of a layer; of one that follows a schedule, that of now."""
    if not callable(layer.momentum):
        return layer.momentum
    updates = keras.ops.convert_to_numpy(layer.updates).max()
    return float(layer.momentum(int(updates)))


def _flags(layers):
    """What of the layers is fixed in a trace."""
    return [
        (
            path,
            id(layer),
            is_frozen(layer),
            getattr(layer, "fused", False),
            layer.get_config(),
        )
        for path, layer in layers.items()
    ]


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


def _trains(model, layers):
    """Whether the steps of training that a model took were with `training=True`.

    The steps of `fit` are not where its `call` takes no such argument: Keras then calls
    it without, and layers take that for inference. A loop or a `train_step` of the
    user's own may give it all the same, and then no statistics are the initial ones.
    """
    if not _steps(model) or "training" in inspect.signature(model.call).parameters:
        return True
    steps = (getattr(type(model), name) for name in ("train_step", "__call__"))
    if any(step.__module__.partition(".")[0] != "keras" for step in steps):
        return True
    return not any(is_initial(la) and not is_frozen(la) for la in layers.values())


def _wide(values):
    """A tensor in a float dtype in which to add up."""
    dtype = keras.backend.standardize_dtype(values.dtype)
    return ops.cast(values, at_least_float32(dtype) if "float" in dtype else "float32")


def _moments(values, mask):
    """Count, mean and variance of all elements of a tensor that count."""
    if mask is None:
        count = ops.cast(ops.size(values), values.dtype)
    else:
        counts = ops.cast(mask, values.dtype) + ops.zeros_like(values)
        count, values = ops.sum(counts), ops.where(mask, values, 0.0)
    n = ops.maximum(count, 1)
    mean = ops.sum(values) / n
    centred = values - mean
    if mask is not None:
        centred = ops.where(mask, centred, 0.0)
    return count, mean, ops.sum(ops.square(centred)) / n


def _wide_moments(*parts):
    return Moments(*(np.asarray(part, "float64") for part in parts))


def _loss(model, x, y, outputs, sample_weight):
    """The loss of a batch, as in `evaluate`; None if the model has none."""
    if not getattr(model, "compiled", False):
        return None
    own = type(model).compute_loss is not keras.Model.compute_loss
    if model.loss is None and not model.losses and not own:
        return None
    arguments = {"x": x, "y": y, "y_pred": outputs, "sample_weight": sample_weight}
    if "training" in inspect.signature(model.compute_loss).parameters:
        arguments["training"] = False
    # Keras divides losses by the number of replicas, a loss of 1 as well.
    unit = keras.losses.MeanAbsoluteError()(np.ones((1, 1)), np.zeros((1, 1)))
    return model.compute_loss(**arguments) / unit


def _hits(y, outputs):
    """How many samples get the right class, and whether the labels are classes.

    None if the outputs, or the labels by their shape, are not classes.
    """
    if len(keras.tree.flatten(outputs)) > 1 or len(keras.tree.flatten(y)) > 1:
        return None
    (y,), (outputs,) = keras.tree.flatten(y), keras.tree.flatten(outputs)
    if len(outputs.shape) != 2 or outputs.shape[1] < 2:
        return None
    y = _wide(y)
    known = ops.all(ops.equal(y, ops.floor(y)))
    if len(y.shape) == 2 and y.shape[1] == outputs.shape[1]:
        one = ops.equal(ops.sum(y, axis=1), 1.0)
        known = ops.logical_and(known, ops.logical_and(ops.all(one), ops.all(y >= 0)))
        labels = ops.argmax(y, axis=1)
    elif len(y.shape) == 1 or (len(y.shape) == 2 and y.shape[1] == 1):
        labels = ops.cast(ops.reshape(y, (-1,)), "int32")
    else:
        return None
    classes = ops.argmax(outputs, axis=1)
    right = ops.equal(ops.cast(labels, "int32"), ops.cast(classes, "int32"))
    return ops.sum(ops.cast(right, "int32")), known
