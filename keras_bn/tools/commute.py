r"""Layers that a scale and a shift per channel go through.

In inference a layer $f$ of the table below has $f(s x + t) = s' f(x) + t'$: what
follows it may as well come before it. The table says what becomes of $s$ and $t$.
"""

import math

import keras
import numpy as np
from keras import layers

from keras_bn.surgery.graph import input_of
from keras_bn.tools.linear import Affine, UnfoldableError, is_activated


def _unchanged(layer, affine, axes, *_):
    """They stay as they are: in inference the layer does nothing."""
    return affine, axes


def _if_linear(layer, affine, axes, *_):
    """They stay as they are if the layer's function is linear."""
    if is_activated(layer):
        raise UnfoldableError("is not linear")
    return affine, axes


def _by_channel(layer, affine, axes, source, target, before):
    """They stay as they are: each channel is picked from or averaged by itself."""
    rank = len(source)
    first = getattr(layer, "data_format", None) == "channels_first"
    channels = 1 if first else rank - 1
    own = 1 if before and len(target) < rank else channels
    if axes != (own,):
        raise UnfoldableError(f"has its channels on axis {own}")
    inside = channels if before else (1 if len(target) < rank else channels)
    return affine, (inside,)


def _if_positive(layer, affine, axes, *others):
    """They stay as they are, since `max(s x) = s max(x)` for `s >= 0`."""
    if (affine.scale < 0).any():
        raise UnfoldableError("takes the largest value, and a scale is negative")
    return _by_channel(layer, affine, axes, *others)


def _if_nearest(layer, affine, axes, *others):
    """They stay as they are if values are repeated, and not interpolated."""
    if layer.interpolation != "nearest":
        raise UnfoldableError(f"interpolates ({layer.interpolation})")
    return _by_channel(layer, affine, axes, *others)


def _if_unshifted(layer, affine, axes, source, target, before):
    """A scale stays as it is; zeros that were shifted would no longer be zeros."""
    if affine.shift.any():
        other = "the shift" if before else "-shift/scale"
        raise UnfoldableError(
            f"pads with zeros; after folding, it would have to pad with {other}"
        )
    return _by_channel(layer, affine, axes, source, target, before)


def _rearranged(layer, affine, axes, source, target, before):
    """They move with the values, as long as they vary along one axis only."""
    if None in (*source[1:], *target[1:]):
        raise UnfoldableError("has a shape that is not known")
    order = np.arange(math.prod(source[1:])).reshape(1, *source[1:])
    if not isinstance(layer, layers.Layer) and source[0] is not None:
        raise UnfoldableError("takes a batch of a fixed size")
    order = layer.call(keras.ops.convert_to_tensor(order, "int32"))
    if tuple(order.shape) != (1, *target[1:]):
        raise UnfoldableError("moves values between samples")
    order = keras.ops.convert_to_numpy(order)[0]  # the input's value at each place
    shape = target if before else source
    channels = np.arange(affine.scale.size).reshape(
        [shape[axis] if axis in axes else 1 for axis in range(1, len(shape))]
    )
    channels = np.broadcast_to(channels, shape[1:])
    if before:
        moved = np.empty(source[1:], int)
        moved.flat[order.ravel()] = channels.ravel()
    else:
        moved = channels.ravel()[order]
    varying = [k for k in range(moved.ndim) if (moved != moved.take([0], k)).any()]
    if len(varying) > 1:
        raise UnfoldableError("does not keep the channels on one axis")
    axis = varying[0] if varying else moved.ndim - 1
    along = moved[tuple(slice(None) if k == axis else 0 for k in range(moved.ndim))]
    return Affine(*(values.ravel()[along] for values in affine)), (axis + 1,)


# Layer -> what becomes of a scale and a shift per channel.
_TABLE = {
    layers.ActivityRegularization: _unchanged,
    layers.AlphaDropout: _unchanged,
    layers.Dropout: _unchanged,
    layers.GaussianDropout: _unchanged,
    layers.GaussianNoise: _unchanged,
    layers.Identity: _unchanged,
    layers.SpatialDropout1D: _unchanged,
    layers.SpatialDropout2D: _unchanged,
    layers.SpatialDropout3D: _unchanged,
    layers.Activation: _if_linear,
    layers.AveragePooling1D: _by_channel,
    layers.AveragePooling2D: _by_channel,
    layers.AveragePooling3D: _by_channel,
    layers.Cropping1D: _by_channel,
    layers.Cropping2D: _by_channel,
    layers.Cropping3D: _by_channel,
    layers.GlobalAveragePooling1D: _by_channel,
    layers.GlobalAveragePooling2D: _by_channel,
    layers.GlobalAveragePooling3D: _by_channel,
    layers.UpSampling1D: _by_channel,
    layers.UpSampling3D: _by_channel,
    layers.UpSampling2D: _if_nearest,
    layers.GlobalMaxPooling1D: _if_positive,
    layers.GlobalMaxPooling2D: _if_positive,
    layers.GlobalMaxPooling3D: _if_positive,
    layers.MaxPooling1D: _if_positive,
    layers.MaxPooling2D: _if_positive,
    layers.MaxPooling3D: _if_positive,
    layers.ZeroPadding1D: _if_unshifted,
    layers.ZeroPadding2D: _if_unshifted,
    layers.ZeroPadding3D: _if_unshifted,
    layers.Flatten: _rearranged,
    layers.Reshape: _rearranged,
    layers.Permute: _rearranged,
}
# The same for operations of `keras.ops`, by the names of their classes.
_OPERATIONS = dict.fromkeys(
    ("Reshape", "Transpose", "Swapaxes", "Moveaxis", "ExpandDims", "Squeeze"),
    _rearranged,
)
# Why a layer is none for a scale and a shift that training changes.
_BY_VALUES = {
    _if_positive: "takes the largest value, and a scale may become negative",
    _if_unshifted: "pads with zeros, which a shift would change",
}
# Layers that do the same to each channel, and whose output scales with their input.
PER_CHANNEL = {k for k, rule in _TABLE.items() if rule not in (_if_linear, _rearranged)}
_NONLINEAR = (layers.ELU, layers.LeakyReLU, layers.PReLU, layers.ReLU, layers.Softmax)


def changes_nothing(node):
    """Whether a call gives its input itself in inference."""
    rule = _TABLE.get(type(node.operation))
    linear = rule is _if_linear and not is_activated(node.operation)
    return not node.arguments.kwargs.get("training") and (linear or rule is _unchanged)


def _keras_name(operation):
    """The name of a class of Keras's own; None for other classes."""
    kind = type(operation)
    own = kind.__module__.partition(".")[0] == "keras"
    return kind.__name__ if own else None


def parts_of(node):
    """The tensors that a call adds, subtracts or concatenates; None for other calls.

    Returns:
        `(tensors, axis)`, where `axis` is None for a sum, and not negative otherwise.
        `signs_of` tells a difference from a sum.
    """
    kind = _keras_name(node.operation)
    if kind not in ("Add", "Concatenate", "Subtract"):
        return None
    whole = node.outputs[0]
    options = {k: v for k, v in node.arguments.kwargs.items() if k != "training"}
    tensors = keras.tree.flatten((node.arguments.args, options))
    if kind == "Add":  # a sum may begin with zero, as in `sum(…)`
        tensors = [t for t in tensors if type(t) not in (int, float) or t != 0]
    if not all(isinstance(tensor, keras.KerasTensor) for tensor in tensors):
        return None  # it adds numbers too
    if kind == "Concatenate":
        return tensors, node.operation.axis % len(whole.shape)
    repeats = any(tensor.shape != whole.shape for tensor in tensors)
    return None if repeats else (tensors, None)


def signs_of(node):
    """The sign of each tensor that a sum adds: 1, or -1 if it subtracts it."""
    minus = _keras_name(node.operation) == "Subtract"
    return [-1 if minus and i else 1 for i in range(len(parts_of(node)[0]))]


def divided(parts, affine, axes):
    """What each part takes of an `Affine` that follows a sum or a concatenation.

    Args:
        parts: as `parts_of` gives them.
        affine, axes: as for `through`.

    Returns:
        A list of an `Affine` for each part.

    Raises:
        UnfoldableError: as `through`.
    """
    tensors, axis = parts
    if axis is None:
        others = Affine(affine.scale, np.zeros_like(affine.shift))
        return [affine, *[others] * (len(tensors) - 1)]
    if axis not in axes:
        return [affine] * len(tensors)
    if len(axes) > 1:
        raise UnfoldableError(f"concatenates along axis {axis} alone")
    ends = np.cumsum([tensor.shape[axis] for tensor in tensors])[:-1]
    return list(map(Affine, *(np.split(values, ends) for values in affine)))


def widened(parts, affine, axes, scaled):
    """What an `Affine` of some parts of a concatenation is to the whole.

    Args:
        parts, affine, axes: as for `divided`.
        scaled: for each part, whether it is one of them.
    """
    tensors, axis = parts
    if axes != (axis,):
        raise UnfoldableError(f"concatenates along axis {axis}")
    sizes = [tensor.shape[axis] for tensor in tensors]
    affines = [
        affine if yes else Affine(np.ones(size), np.zeros(size))
        for yes, size in zip(scaled, sizes, strict=True)
    ]
    return Affine(*map(np.concatenate, zip(*affines, strict=True)))


def through(node, affine, axes, *, before, trains=False):
    """What becomes of an `Affine` on the way through a call, against or with it.

    Args:
        node: the call of a layer that is not a linear one with weights.
        affine: along the given axes, of the output if `before`, else of the input.
        axes: a tuple, not negative and ascending.
        before: whether the affine map follows the layer and is to come before it.
        trains: whether its values may change.

    Returns:
        `(affine, axes)` of the other side.

    Raises:
        UnfoldableError: saying why not, after the name of the layer.
    """
    layer = node.operation
    if isinstance(layer, _NONLINEAR):
        raise UnfoldableError("is not linear")
    rule = _TABLE.get(type(layer))
    if rule is None and not isinstance(layer, layers.Layer):
        rule = _OPERATIONS.get(_keras_name(layer))
    if rule is None:
        raise UnfoldableError(
            f"is of type {type(layer).__name__}, which `fold` does not go through"
        )
    if node.arguments.kwargs.get("training"):
        raise UnfoldableError("is called with `training`")
    if trains and rule in _BY_VALUES:
        raise UnfoldableError(_BY_VALUES[rule])
    source, target = input_of(node), node.outputs[0]
    return rule(layer, affine, axes, source.shape, target.shape, before)
