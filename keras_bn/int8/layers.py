r"""Layers that compute as their int8 counterparts do, in floats, and train.

A linear layer and the batch normalization after it run with the folded kernel
$\gamma W / \sigma$, where $\sigma$ is the moving standard deviation, so that the
quantized weights are those of inference from the first step on. While the
normalization trains, the output is still normalized by the statistics of the batch:

$$ y = \mathrm{BN}(Wx) + \frac{\sigma}{\sigma_B}
       \left(Q(\gamma W/\sigma) - \gamma W/\sigma\right) x. $$

By linearity this is the correction of Krishnamoorthi's section 3.2.2: the convolution
with the quantized kernel, times $\sigma/\sigma_B$, plus $\beta - \gamma\mu_B/\sigma_B$.

Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference:
A whitepaper", 2018.
"""

import math
from typing import Any

import keras
from keras import ops
from keras.quantizers import fake_quant_with_min_max_vars as fake_quant

from keras_bn.backends.layout import broadcast
from keras_bn.layer.step import State, scale_and_offset
from keras_bn.surgery.arrays import axes as axes_of
from keras_bn.surgery.norms import is_frozen
from keras_bn.tools.linear import call_with, linear

# So that the largest weight, rounded, is not a hair outside of the range.
_ROOM = 1 + 1e-6
_LEAST = 1e-8


class _Aware(keras.layers.Layer):
    """A layer that `keras_bn.quantize_aware` makes (`surgery.norms.MadeByTool`)."""

    made_by = "keras_bn.quantize_aware"

    @property
    def folded_normalization(self):
        return getattr(self, "normalization", None)


@keras.saving.register_keras_serializable(package="keras_bn")
class FakeQuantizer(_Aware):
    """Rounds its input to the values that an int8 tensor can have.

    Args:
        momentum: weight of the old value in the moving range.
        fixed: `(low, high)` if the range does not move, as that of a softmax.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(self, momentum=0.99, fixed=None, **kwargs):
        super().__init__(**kwargs)
        self.momentum = momentum
        self.fixed = None if fixed is None else tuple(fixed)
        self.supports_masking = True
        # While it is a list, calls append their input's range and round nothing.
        self.observed: list | None = None

    def build(self, input_shape):
        low, high = self.fixed or (-1.0, 1.0)
        self.low, self.high = (
            self.add_weight(
                shape=(),
                name=name,
                initializer=keras.initializers.Constant(value),
                dtype="float32",
                autocast=False,
                trainable=False,
                aggregation="mean",
            )
            for name, value in (("low", low), ("high", high))
        )
        self.built = True

    def call(self, inputs, training=None):
        if self.observed is not None:
            if 0 not in inputs.shape:
                values = ops.stop_gradient(inputs)
                self.observed.append((float(ops.min(values)), float(ops.max(values))))
            return inputs
        low, high = ops.convert_to_tensor(self.low), ops.convert_to_tensor(self.high)
        if training and self.trainable and self.fixed is None:
            values = ops.stop_gradient(inputs)
            # An empty batch, and one that is not finite, moves nothing.
            least = ops.min(values, initial=math.inf)
            most = ops.max(values, initial=-math.inf)
            usable = ops.logical_and(ops.isfinite(least), ops.isfinite(most))
            low = ops.where(usable, self._moved(low, ops.minimum(least, 0.0)), low)
            high = ops.where(usable, self._moved(high, ops.maximum(most, 0.0)), high)
            self.low.assign(low)
            self.high.assign(high)
        return fake_quant(inputs, low, ops.maximum(high, low + _LEAST))

    def _moved(self, old, new):
        return old * self.momentum + new * (1.0 - self.momentum)

    def take_observed(self):
        """Set the range to the mean of those observed, and round from now on."""
        lows, highs = zip(*(self.observed or ()), strict=True)
        self.observed = None
        if self.fixed is None:
            self.low.assign(min(sum(lows) / len(lows), 0.0))
            self.high.assign(max(sum(highs) / len(highs), 0.0))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        own = {"momentum": self.momentum, "fixed": self.fixed}
        return super().get_config() | own


class _Wrapper(_Aware):
    """A layer around others, whose names and variables stay."""

    def get_config(self):
        wrapped = {name: getattr(self, name) for name in self.wrapped}
        return super().get_config() | keras.saving.serialize_keras_object(wrapped)

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in cls.wrapped:
            config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_bn")
class FakeQuantizedLinear(_Wrapper):
    """A linear layer with rounded weights, and the normalization after it folded in.

    Args:
        layer: a linear layer. With a normalization, it has no activation.
        normalization: a `keras_bn.BatchNormalization`, or None.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    wrapped = ("layer", "normalization")

    def __init__(self, layer, normalization=None, **kwargs):
        super().__init__(**kwargs)
        self.layer, self.normalization = layer, normalization
        self.supports_masking = layer.supports_masking
        self.between: Any = None
        if len(linear(layer).names) == 2:
            self.between = FakeQuantizer(name="between")
        # `weights_of_inference()`, while a file is made: the converter rounds constants
        # in the same way.
        self.baked: tuple | None = None

    def build(self, input_shape):
        if not self.layer.built:
            self.layer.build(input_shape)
        if self.normalization is not None and not self.normalization.built:
            self.normalization.build(self.layer.compute_output_shape(input_shape))
        if self.between is not None and not self.between.built:
            self.between.build(None)
        self.built = True

    @property
    def linear(self):
        """The `Linear` of the layer."""
        return linear(self.layer)

    def call(self, inputs, training=None, mask=None):
        norm, last = self.normalization, self.linear.last
        kernels, bias, folded = self._weights()
        x = self._to_last(inputs, kernels, training)
        if norm is None or not _trains(norm, training):
            return self._linear(x, kernels[last], bias)
        mask = mask if self.supports_masking else None
        plain = self._plain(x)
        _, moments = norm.normalize_batch(plain, mask)
        inverse = ops.rsqrt(norm.moving_variance + norm.epsilon)
        batch = ops.rsqrt(moments.variance + norm.epsilon)
        ratio = ops.where(moments.count > 0, batch / inverse, ops.ones_like(batch))
        error = self._linear(x, kernels[last] - folded, None)
        axis = axes_of(norm)[0] % len(error.shape)
        ratio = broadcast(ops.stop_gradient(ratio), error.shape, (axis,))
        return norm(plain, training=training, mask=mask) + error * ratio

    def call_unfolded(self, inputs, training=None, mask=None):
        """The output by a call of the normalization; passes over data need it."""
        x = self._to_last(inputs, self._weights()[0], training)
        mask = mask if self.supports_masking else None
        return self.normalization(self._plain(x), training=training, mask=mask)

    def weights_of_inference(self):
        """`(kernels, bias)`: the rounded kernels by name, and the bias or None."""
        kernels, bias, _ = self._weights()
        return keras.tree.map_structure(
            lambda w: None if w is None else ops.convert_to_numpy(w), (kernels, bias)
        )

    def _weights(self):
        """`(kernels, bias, folded)` of inference: the last kernel unrounded, too."""
        if self.baked is not None:
            kernels, bias = self.baked
            return {n: ops.convert_to_tensor(k) for n, k in kernels.items()}, bias, None
        edit, bias = self.linear, self.layer.bias
        kernels = {n: ops.convert_to_tensor(getattr(self.layer, n)) for n in edit.names}
        if self.normalization is not None:
            scale, offset = _scale_and_offset(self.normalization)
            kernels[edit.last] = edit.scaled(kernels[edit.last], scale, ops)
            bias = offset if bias is None else bias * scale + offset
        rounded = {name: self._rounded(name, kernels[name]) for name in edit.names}
        return rounded, bias, kernels[edit.last]

    def _rounded(self, name, kernel):
        matrix, back = self.linear.as_matrix(name, kernel, ops)
        limit = ops.stop_gradient(ops.max(ops.abs(matrix), axis=0))
        limit = ops.maximum(limit * _ROOM, _LEAST)
        return back(fake_quant(matrix, -limit, limit, narrow_range=True, axis=-1))

    def _to_last(self, x, kernels, training):
        """The input of the last kernel: of a separable one, the first's output."""
        if self.between is None:
            return x
        layer = self.layer
        y = ops.depthwise_conv(
            x,
            kernels["depthwise_kernel"],
            layer.strides,
            layer.padding,
            layer.data_format,
            layer.dilation_rate,
        )
        return self.between(y, training=training)

    def _plain(self, x):
        """The output of the layer by its last kernel as it is."""
        kernel = ops.convert_to_tensor(getattr(self.layer, self.linear.last))
        return self._linear(x, kernel, self.layer.bias)

    def _linear(self, x, kernel, bias):
        """What the layer computes with other weights; a bias of None is zero."""
        layer = self.layer
        # A single value that a convolution of lines adds itself stays in floats.
        line = len(x.shape) == 3 and bias is not None and bias.shape[-1] == 1
        own = None if layer.bias is None else tuple(layer.bias.shape)
        inside = bias is not None and tuple(bias.shape) == own and not line
        if self.between is not None:
            inside = False
            y = ops.conv(x, kernel, 1, "valid", layer.data_format)
        else:
            weights = {self.linear.last: kernel, "activation": None}
            weights |= {"bias": bias if inside else None, "use_bias": inside}
            y = call_with(layer, weights, x)
        if bias is not None and not inside:
            bias = ops.convert_to_tensor(bias)
            if len(bias.shape) == 1:
                axis = self.linear.channel_axis(len(y.shape))
                bias = broadcast(bias, y.shape, (axis,))
            y = y + bias
        return y if layer.activation is None else layer.activation(y)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)


@keras.saving.register_keras_serializable(package="keras_bn")
class FakeQuantizedNormalization(_Wrapper):
    """A batch normalization that is in no linear layer, as a scale for each channel.

    In inference it is a depthwise convolution with one weight for each channel, which
    int8 keeps exactly: each has a scale of its own.

    Args:
        normalization: a `keras_bn.BatchNormalization` with its channels on the last
            axis.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    wrapped = ("normalization",)

    def __init__(self, normalization, **kwargs):
        super().__init__(**kwargs)
        self.normalization = normalization
        self.supports_masking = True

    def build(self, input_shape):
        if not self.normalization.built:
            self.normalization.build(input_shape)
        self.built = True

    def call(self, inputs, training=None, mask=None):
        norm = self.normalization
        if _trains(norm, training):
            return self.call_unfolded(inputs, training, mask)
        scale, offset = _scale_and_offset(norm)
        image, channels = len(inputs.shape) == 4, inputs.shape[-1]
        x = inputs if image else ops.reshape(inputs, (-1, 1, 1, channels))
        kernel = ops.reshape(scale, (1, 1, channels, 1))
        y = ops.depthwise_conv(x, kernel, 1, "valid", "channels_last") + offset
        return y if image else ops.reshape(y, ops.shape(inputs))

    def call_unfolded(self, inputs, training=None, mask=None):
        """The output by a call of the normalization; passes over data need it."""
        return self.normalization(inputs, training=training, mask=mask)

    def compute_output_shape(self, input_shape):
        return input_shape


def _trains(norm, training):
    """Whether a call normalizes by the statistics of the batch."""
    return training and not is_frozen(norm)


def _scale_and_offset(norm):
    """What a normalization does in inference, as tensors."""
    state = State(norm.moving_mean, norm.moving_variance)
    return scale_and_offset(norm.gamma, norm.beta, state, norm.epsilon, "float32")
