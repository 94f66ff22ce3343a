"""A model for training in which all is rounded as in int8."""

import functools
from typing import Any, TypeVar

import keras
import numpy as np
from keras import layers

from keras_bn.int8 import tflite
from keras_bn.int8.convert import check_layers, constant, convert
from keras_bn.int8.equalize import relu_limit
from keras_bn.int8.layers import (
    FakeQuantizedLinear,
    FakeQuantizedNormalization,
    FakeQuantizer,
)
from keras_bn.int8.listed import check_listed
from keras_bn.int8.measure import not_finite
from keras_bn.int8.options import Options
from keras_bn.int8.samples import batch_of, in_order
from keras_bn.passes.data import NoDataError, batches
from keras_bn.surgery.arrays import axes as axes_of
from keras_bn.surgery.calls import as_declared
from keras_bn.surgery.classes import as_graphs
from keras_bn.surgery.exchange import bypass, detach, exchange, optimizers, trained_by
from keras_bn.surgery.functional import opened
from keras_bn.surgery.graph import graph_of, scope
from keras_bn.surgery.insert import insert
from keras_bn.surgery.norms import is_frozen, is_normalization
from keras_bn.surgery.private import require
from keras_bn.surgery.view import ModelView
from keras_bn.tools.commute import PER_CHANNEL
from keras_bn.tools.convert import convert as convert_layers
from keras_bn.tools.fold import FoldPlan
from keras_bn.tools.fuse import separate
from keras_bn.tools.linear import is_activated, is_linear

ModelT = TypeVar("ModelT", bound=keras.Model)

# Ranges that TFLite's operations always have for int8.
_FIXED = {
    "softmax": (0.0, 255 / 256),
    "sigmoid": (0.0, 255 / 256),
    "tanh": (-1.0, 127 / 128),
}
# The name of an activation that is taken out of a layer ends so, that of its rounding
# begins so.
_ACTIVATION, _ROUNDING = "_activation", "int8_"
# What moves or picks values: the output has the range of the input.
_MOVES = {"ExpandDims", "Flatten", "Permute", "RepeatVector", "Reshape", "Squeeze"}
_OTHERS = {"ActivityRegularization", *(f"GlobalAveragePooling{n}D" for n in (1, 2, 3))}
_SAME_RANGE = {k.__name__ for k in PER_CHANNEL} - _OTHERS | _MOVES | {"Transpose"}


def quantize_aware(
    model: ModelT,
    data: Any,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    compiled: bool = True,
) -> ModelT:
    """A copy of a model that computes as int8 does, for fine-tuning.

    The weights of every linear layer pass a fake quantization: they are rounded to the
    values that int8 can have, symmetric about 0, with a scale for each output channel.
    So do the activations, with a range for each tensor, which is first that of `data`
    and then a moving average over the batches of training. Gradients go straight
    through the rounding.

    A batch normalization after a linear layer is folded into its weights before these
    are rounded, by the moving statistics; while it trains, the output is corrected, so
    that it is normalized by the statistics of the batch. Freeze the statistics for the
    last part of training: `keras_bn.freeze(model)`, or the callback
    `keras_bn.FreezeAfter(steps)`.

    Variables keep their names, values and trainable flags. If the model was compiled,
    so is the copy, with the state of its optimizer. `keras_bn.export_int8(copy, path)`
    writes the file, whose layers compute what those of the copy do. It needs Keras's
    TensorFlow backend; a copy from another one is saved, and loaded there.

    Args:
        model: a built model, which does not change, with `keras_bn` or Keras batch
            normalizations: Functional, Sequential, or one that `keras_bn.functional`
            can open. The copy has `keras_bn` layers.
        data: samples as in training, as `fit` takes them; a few hundred are enough.
        steps, batch_size: as in `keras_bn.recalibrate`.
        compiled: whether the copy is compiled if the model is.

    Returns:
        A model of the same class, with further layers for the activations. Of a
        subclassed model it is a Functional model, not compiled.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: for no data, models that `keras_bn.functional`
            refuses, layers that the converter cannot make integer, by name, and an
            optimizer that has no state for a weight that trains now.
        RuntimeError: if TensorFlow is older than 2.17.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018; Krishnamoorthi, "Quantizing deep
    convolutional networks for efficient inference: A whitepaper", 2018, section 3.2.2.

    Example:

    >>> import keras, keras_bn, numpy as np, tempfile
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 1)),
    ...     keras.layers.Conv2D(4, 3, name="conv"),
    ...     keras_bn.BatchNormalization(name="bn"),
    ...     keras.layers.ReLU(name="relu"),
    ... ])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 8, 8, 1)).astype("float32")
    >>> aware = keras_bn.quantize_aware(model, x)
    >>> [layer.name for layer in aware.layers]
    ['int8_input', 'conv', 'relu', 'int8_relu']
    >>> history = aware.fit(x, model.predict(x, verbose=0), verbose=0)
    >>> keras_bn.freeze(aware)
    ['conv/bn']
    >>> report = keras_bn.export_int8(aware, tempfile.mkdtemp() + "/model.tflite")
    >>> report.error < 0.01
    True
    """
    require("keras_bn.quantize_aware", "layers", "graph", "copy", "data")
    if keras.backend.backend() == "tensorflow":
        tflite.check_aware("keras_bn.quantize_aware")
    with opened(ModelView(model), strict=True) as (view, _):
        return _aware(view, data, steps, batch_size, compiled)


def _aware(original, data, steps, batch_size, compiled):
    model: Any = original.model
    converts = keras.backend.backend() == "tensorflow"
    check_layers(original)
    if not converts:
        check_listed(original)
    if original.of_type(FakeQuantizer):
        raise ValueError(
            f"'{model.name}' is from `quantize_aware` already. Train it, then write it "
            "by `keras_bn.export_int8`."
        )
    copy = convert_layers(model, compiled=compiled)
    view = ModelView(copy)
    separate(view)  # what `freeze(model, fuse=True)` has fused is rounded here
    _check_optimizers(copy)
    with scope(copy):
        _quantize_weights(view)
        view = ModelView(copy)
        insert(view, _places(view))
    view = ModelView(copy)
    as_graphs(view)
    sample = _set_ranges(view, data, steps, batch_size)
    # Whether a file can be made shows now, and not after training.
    if converts:
        paths = {path for path, _ in original.layers}
        with constant(view, trained=True):
            quoted = functools.partial(_quoted, paths)
            convert(copy, sample, Options(), quoted=quoted)
    return copy


def _check_optimizers(model):
    """Refuse an optimizer that does not know a variable that trains."""
    for optimizer in optimizers(model):
        if not optimizer.built or hasattr(optimizer, "inner_optimizer"):
            continue
        known = {id(v) for v in trained_by(optimizer)}
        new = [v.path for v in model.trainable_variables if id(v) not in known]
        if new:
            raise ValueError(
                f"The optimizer of '{model.name}' has no state for {', '.join(new)}, "
                "so it cannot be copied. Compile the model again, or pass "
                "`compiled=False` and compile what comes back."
            )


def _quantize_weights(view):
    """Put layers that round their weights in the place of the linear ones."""
    plan = FoldPlan(view, fusing=True)
    norms = {}  # the normalization after a linear layer, by the `id` of this
    shapes = {}  # the shape of an input of each layer, by its `id`
    for node in view.calls:
        tensor, norm = node.input_tensors[0], node.operation
        shapes[id(norm)] = tensor.shape
        before = view.producer(tensor)
        target = None if before is None else plan.edits.get(id(before.operation))
        if target is None or id(norm) not in plan.folded:
            continue
        if plan.fused[id(target.layer)].axes == (
            target.channel_axis(len(tensor.shape)),
        ):
            norms[id(target.layer)] = norm
    for path, norm in view.normalizations.items():
        if norm.renorm and not is_frozen(norm):
            raise ValueError(
                f"'{path}' has renorm=True, which corrects batches in its own way. "
                "Freeze it first: `keras_bn.freeze(model)`."
            )
    bypass(view, list(norms.values()))
    inside = {id(norm) for norm in norms.values()}
    pairs = []
    for path, layer in view.layers:
        if id(layer) not in shapes or id(layer) in inside or not is_linear(layer):
            continue
        shape = shapes[id(layer)]
        if is_normalization(layer):
            rank = len(shape)
            if [axis % rank for axis in axes_of(layer)] != [rank - 1]:
                raise ValueError(
                    f"'{path}' does not follow a linear layer. Alone, int8 needs its "
                    f"channels on the last axis; they are on axis {layer.axis}."
                )
            new = FakeQuantizedNormalization(layer, name=layer.name)
        else:
            new = FakeQuantizedLinear(layer, norms.get(id(layer)), name=layer.name)
        new.build(shape)
        pairs.append((layer, new))
    exchange(pairs, view.holders)
    detach([old for old, _ in pairs] + list(norms.values()))


def _places(view):
    """Where values are rounded: pairs of a tensor and the layers behind it."""
    is_float = keras.backend.is_float_dtype
    inputs = [t for t in view.graph.inputs if is_float(t.dtype)]
    names = ["input"] if len(inputs) == 1 else [t.name for t in inputs]
    places = [(t, [_rounding(n)]) for t, n in zip(inputs, names, strict=True)]
    behind: dict[int, list] = {}
    for node in view.calls:
        operation = node.operation
        if len(node.outputs) != 1 or not is_float(node.outputs[0].dtype):
            continue
        if id(operation) not in behind:
            behind[id(operation)] = _behind(node, view)
        if behind[id(operation)]:
            places.append((node.outputs[0], behind[id(operation)]))
    return places


def _behind(node, view):
    """The layers behind a call, of which a shared layer has the same at each call."""
    operation = node.operation
    if graph_of(operation) is not None or type(operation).__name__ in _SAME_RANGE:
        return []
    name = operation.name
    if isinstance(operation, FakeQuantizedLinear):
        layer = operation.layer
        if is_activated(layer) and not _merges(activation := layer.activation):
            layer.activation = keras.activations.linear
            after = layers.Activation(activation, name=f"{name}{_ACTIVATION}")
            return [_rounding(name), after, _rounding(after.name, after)]
    adds = isinstance(operation, layers.Add) or type(operation).__name__ == "Add"
    follower = view.next(node)
    merged = follower is not None and _merges(follower.operation)
    if merged and (adds or isinstance(operation, FakeQuantizedLinear)):
        return []
    return [_rounding(name, operation)]


def _merges(operation):
    """Whether TFLite computes a ReLU in one operation with the layer before it."""
    return relu_limit(operation) in (float("inf"), 6.0)


def _rounding(name, operation=None):
    """The layer that rounds a value: of an operation, in the range it has in int8."""
    function = getattr(operation, "activation", None)
    kind = getattr(function, "__name__", type(operation).__name__)
    return FakeQuantizer(fixed=_FIXED.get(kind.lower()), name=f"{_ROUNDING}{name}")


def _quoted(paths, path):
    """What an error says for a path: a layer that the user's model has."""
    if path not in paths and path.endswith(_ACTIVATION):
        return f"the activation of '{path.removesuffix(_ACTIVATION)}'"
    return f"'{path}'"


def _set_ranges(view, data, steps, batch_size):
    """Set the ranges of activations to those of the data; returns a sample of it."""
    quantizers, model = view.of_type(FakeQuantizer), view.model
    for quantizer in quantizers.values():
        quantizer.observed = []
    x = None
    for x, _, _ in batches(data, steps=steps, batch_size=batch_size):
        model(as_declared(model, x), training=False)
    if x is None:
        raise NoDataError
    for path, quantizer in quantizers.items():
        if not np.isfinite(quantizer.observed).all() or not quantizer.observed:
            around, slash, name = path.rpartition("/")
            layer = f"{around}{slash}{name.removeprefix(_ROUNDING)}"
            raise ValueError(not_finite(layer))
        quantizer.take_observed()
    return [array[: batch_of(model)] for array in in_order(model, x)]
