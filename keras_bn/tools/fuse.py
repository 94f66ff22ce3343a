"""Linear layers that take in the frozen normalization behind them, call by call.

`Deferring` stands in the place of the `call` of a linear layer. It gives the layer's
own output, and attaches a deferred affine to it (`keras_bn.layer.fusion`). The layer
has the same class, config and variables as before, so nothing of this is saved.
"""

import functools

import keras
from keras import ops

from keras_bn.backends import backend
from keras_bn.backends.plan import elements
from keras_bn.layer import fusion
from keras_bn.surgery import private
from keras_bn.tools.linear import call_with, is_activated

# Scaling a kernel costs as much per element as scaling an output: where the output has
# fewer than this many times the elements of the kernel, it is scaled itself.
WORTH = 4


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
        worth = elements(y.shape) >= WORTH * elements(getattr(layer, self._last).shape)
        if backend.prunes(y) and worth and not is_activated(layer):
            compute = functools.partial(self._compute, inputs, options)
            fusion.attach(y, fusion.DeferredAffine(self.axes, compute))
        return y

    def _compute(self, inputs, options, scale, offset):
        """The output, scaled and shifted, by the layer's own class on other weights."""
        layer = self.layer
        for_kernel, for_bias = self._shapes
        with private.AutocastScope(None):  # the product is rounded, not its factors
            kernel = ops.cast(getattr(layer, self._last), scale.dtype)
            kernel = kernel * _reshaped(scale, for_kernel)
            bias = _reshaped(offset, for_bias)
            if layer.bias is not None:
                own = ops.cast(layer.bias, scale.dtype)
                bias = own * _reshaped(scale, for_bias) + bias
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


def defer(linear, axes):
    """Let a linear layer attach a deferred affine to its output.

    Args:
        linear: the `Linear` of the layer.
        axes: the channel axes of its output.
    """
    vars(linear.layer)["call"] = Deferring(linear, axes)


def separate(view):
    """Let the linear layers of a model compute as their classes do.

    Args:
        view: the `ModelView` of the model.
    """
    for _, layer in view.layers:
        if isinstance(vars(layer).get("call"), Deferring):
            del vars(layer)["call"]


def has_own_call(layer: keras.layers.Layer) -> bool:
    """Whether someone else has replaced the `call` of this one layer."""
    return "call" in vars(layer) and not isinstance(vars(layer)["call"], Deferring)
