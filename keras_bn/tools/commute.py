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
    order = layer.call(keras.ops.convert_to_tensor(order, "int32"))
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
_NONLINEAR = (layers.ELU, layers.LeakyReLU, layers.PReLU, layers.ReLU, layers.Softmax)


def changes_nothing(node):
    """Whether a call gives its input itself in inference."""
    rule = _TABLE.get(type(node.operation))
    linear = rule is _if_linear and not is_activated(node.operation)
    return not node.arguments.kwargs.get("training") and (linear or rule is _unchanged)


def parts_of(node):
    """The tensors that a call adds or concatenates; None for any other call.

    Returns:
        `(tensors, axis)`, where `axis` is None for a sum, and not negative otherwise.
    """
    kind = type(node.operation)
    keras_own = kind.__module__.partition(".")[0] == "keras"
    if not keras_own or kind.__name__ not in ("Add", "Concatenate"):
        return None
    whole = node.outputs[0]
    tensors = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
    tensors = [t for t in tensors if not (type(t) is int and t == 0)]  # of `sum(…)`
    if not all(isinstance(tensor, keras.KerasTensor) for tensor in tensors):
        return None  # it adds numbers too
    if kind.__name__ == "Concatenate":
        return tensors, node.operation.axis % len(whole.shape)
    repeats = any(tensor.shape != whole.shape for tensor in tensors)
    return None if repeats else (tensors, None)


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


def through(node, affine, axes, *, before):
    """What becomes of an `Affine` on the way through a call, against or with it.

    Args:
        node: the call of a layer that is not a linear one with weights.
        affine: along the given axes, of the output if `before`, else of the input.
        axes: a tuple, not negative and ascending.
        before: whether the affine map follows the layer and is to come before it.

    Returns:
        `(affine, axes)` of the other side.

    Raises:
        UnfoldableError: saying why not, after the name of the layer.
    """
    layer = node.operation
    if isinstance(layer, _NONLINEAR):
        raise UnfoldableError("is not linear")
    rule = _TABLE.get(type(layer))
    if rule is None:
        raise UnfoldableError(
            f"is of type {type(layer).__name__}, which `fold` does not go through"
        )
    if node.arguments.kwargs.get("training"):
        raise UnfoldableError("is called with `training`")
    source, target = input_of(node), node.outputs[0]
    return rule(layer, affine, axes, source.shape, target.shape, before)
