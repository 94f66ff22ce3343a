"""Layers that take in the frozen normalization behind them, call by call.

Each class here stands in the place of the `call` of a layer. It gives the layer's own
output, and attaches a deferred affine to it (`keras_bn.layer.fusion`). The layer has
the same class, config and variables as before, so nothing of this is saved.
"""

import functools
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_bn.backends import backend
from keras_bn.backends.plan import elements
from keras_bn.layer import fusion
from keras_bn.moments import at_least_float32
from keras_bn.surgery import private
from keras_bn.tools.linear import call_with, is_activated

# One kernel of a sum of branches takes several passes to compute: where the output has
# fewer than this many times their elements, the branches are computed by themselves.
MERGED = 1 / 4


class Deferring:
    """The `call` of a linear layer, with a deferred affine on its output.

    Args:
        linear: the `Linear` of the layer.
        axes: the channel axes of its output.
    """

    def __init__(self, linear, axes):
        self.layer, self.axes = linear.layer, tuple(axes)
        self._last = linear.last
        self._shapes = linear.along_output(axes)

    def __call__(self, inputs, **options):
        layer = self.layer
        y = type(layer).call(layer, inputs, **options)
        if backend.prunes(y) and not is_activated(layer):
            size = elements(getattr(layer, self._last).shape)
            run = functools.partial(self._run, inputs, options)
            deferred = (self.axes, size, run, self._weights, layer, inputs)
            fusion.attach(y, fusion.DeferredAffine(*deferred))
        return y

    def _weights(self, scale, offset):
        """The last kernel and the bias, scaled and shifted."""
        layer = self.layer
        for_kernel, for_bias = self._shapes
        with private.AutocastScope(None):  # the product is rounded, not its factors
            kernel = ops.cast(getattr(layer, self._last), scale.dtype)
            kernel = kernel * _reshaped(scale, for_kernel)
            bias = _reshaped(offset, for_bias)
            if layer.bias is not None:
                own = ops.cast(layer.bias, scale.dtype)
                bias = own * _reshaped(scale, for_bias) + bias
        return kernel, bias

    def _run(self, inputs, options, kernel, bias):
        """The output, by the layer's own class on other weights."""
        layer = self.layer
        kernel, bias = (ops.cast(w, layer.compute_dtype) for w in (kernel, bias))
        convolution = type(layer) is keras.layers.Conv2D
        weights = {
            self._last: kernel,
            "bias": None if convolution else bias,
            "use_bias": not convolution,
        }
        y = call_with(layer, weights, inputs, **options)
        return backend.add_offset(y, bias, self.axes[0]) if convolution else y


def _reshaped(values, shape):
    """Values per channel in a shape that broadcasts; without an op where they do."""
    return values if len(shape) == 1 else ops.reshape(values, shape)


class Way(NamedTuple):
    """What a tensor that a layer takes takes of the scale and the offset behind it.

    Args:
        axes: its channel axes.
        channels: which value each of its channels takes: an array of integers.
        shifts: whether it takes the offset too.
        itself: whether it may be scaled itself.
    """

    axes: tuple[int, ...]
    channels: np.ndarray
    shifts: bool
    itself: bool = False

    def deferred(self, tensor):
        """The deferred affine of a tensor of such channels; None without one."""
        if tuple(tensor.shape[self.axes[0] :])[:1] != (len(self.channels),):
            return None  # another model may call the layer on other tensors
        if found := fusion.find(tensor, self.axes):
            return found
        return fusion.itself(tensor, tensor, self.axes) if self.itself else None

    def of(self, scale, offset):
        """The scale and the offset of the tensor."""
        scale, offset = (ops.take(v, self.channels) for v in (scale, offset))
        return scale, offset if self.shifts else ops.zeros_like(offset)


class Passing:
    """The `call` of a layer that a scale and an offset per channel go through.

    Where all tensors that it takes have a deferred affine, its output has one.

    Args:
        layer: the layer.
        axes: the channel axes of its output.
        ways: a `Way` for each tensor that it takes.
    """

    def __init__(self, layer, axes, ways):
        self.layer, self.axes, self.ways = layer, axes, ways

    def __call__(self, inputs, **options):
        y = type(self.layer).call(self.layer, inputs, **options)
        found = self._found(inputs)
        # The same tensor as an input has one, which must not hold that tensor.
        if found is not None and fusion.find(y, self.axes) is None:
            run = functools.partial(self._run, inputs, found, options)
            size = sum(deferred.size for deferred in found)
            fusion.attach(y, fusion.DeferredAffine(self.axes, size, run))
        return y

    def _found(self, inputs):
        """The deferred affine of each tensor; None if one has none."""
        tensors = keras.tree.flatten(inputs)
        if len(tensors) != len(self.ways):
            return None
        pairs = zip(self.ways, tensors, strict=True)
        found = [way.deferred(tensor) for way, tensor in pairs]
        return None if None in found else found

    def _run(self, inputs, found, options, scale, offset):
        """The output for inputs that are scaled and shifted."""
        pairs = zip(found, self.ways, strict=True)
        parts = [d.compute(*way.of(scale, offset)) for d, way in pairs]
        again = keras.tree.pack_sequence_as(inputs, parts)
        return type(self.layer).call(self.layer, again, **options)


class Merging(Passing):
    """The `call` of a sum of parallel branches, which one of their layers computes.

    Args:
        layer, axes, ways: as for `Passing`.
        layers: the linear layer of each branch, or the normalization of what they read,
            or None for that itself.
        placements: the `Placement` of the kernel of each branch.
        into: which of the branches computes all.
    """

    def __init__(self, layer, axes, ways, layers, placements, into):
        super().__init__(layer, axes, ways)
        self._layers, self._placements, self._into = layers, placements, into

    def __call__(self, inputs, **options):
        found = self._found(inputs)
        size = sum(deferred.size for deferred in found or ())
        outputs = elements(keras.tree.flatten(inputs)[0].shape)
        if (
            [deferred.layer for deferred in found or ()] != self._layers
            or any(deferred.source is not found[0].source for deferred in found)
            or outputs < size * MERGED
        ):
            return super().__call__(inputs, **options)
        weights = functools.partial(self._weights, found)
        whole = found[self._into]._replace(weights=weights, size=size)
        dtype = at_least_float32(self.layer.compute_dtype)
        ones = ops.ones(len(self.ways[0].channels), dtype)
        y = whole.compute(ones, ops.zeros_like(ones))
        fusion.attach(y, whole)
        return y

    def _weights(self, found, scale, offset):
        """The sums of kernels and biases."""
        kernel, bias, whole = 0, 0, found[self._into].layer.kernel.shape
        for deferred, place in zip(found, self._placements, strict=True):
            own, shift = deferred.weights(place.sign * scale, offset)
            own = ops.reshape(own, place.shape) * ops.cast(place.factor, own.dtype)
            kernel, bias = kernel + ops.pad(own, place.widths), bias + shift
            offset = ops.zeros_like(offset)
        return ops.reshape(kernel, whole), bias


def separate(view):
    """Let the layers of a model compute as their classes do.

    Args:
        view: the `ModelView` of the model.
    """
    for _, layer in view.layers:
        if isinstance(vars(layer).get("call"), Deferring | Passing):
            del vars(layer)["call"]


def has_own_call(layer: keras.layers.Layer) -> bool:
    """Whether someone else has replaced the `call` of this one layer."""
    return not isinstance(vars(layer).get("call"), Deferring | Passing | None)
