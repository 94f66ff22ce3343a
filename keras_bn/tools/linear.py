r"""Folding a scale and a shift per channel into the weights of a linear layer.

A linear layer computes $y = Kx + b$. A scale and shift of its output change it to
$s(Kx + b) + t = (sK)x + (sb + t)$; of its input, to
$K(sx + t) + b = (Ks)x + (Kt + b)$.

All arrays are float64. A layer without a bias has one of zeros here.
"""

import functools
import math
import string
from typing import NamedTuple

import numpy as np
from keras import activations, layers

from keras_bn.surgery.arrays import axes as axes_of
from keras_bn.surgery.arrays import float64
from keras_bn.surgery.norms import is_normalization
from keras_bn.surgery.rebuild import give_bias


class Affine(NamedTuple):
    """A scale and a shift for each channel: `x * scale + shift`."""

    scale: np.ndarray
    shift: np.ndarray


class UnfoldableError(Exception):
    """A reason why an affine map cannot be folded into a layer."""


def scale_convolution_input(kernel, bias, affine, groups=1):
    """The kernel and bias of an affine map before a convolution without padding.

    Args:
        kernel: array of shape `(..., channels // groups, filters)`.
        bias: array of shape `(filters,)`.
        affine: an `Affine` per input channel.
        groups: of the convolution.

    Returns:
        `(kernel, bias)`.
    """
    filters = kernel.shape[-1] // groups

    def along(values):  # per channel of the group that each filter belongs to
        return np.repeat(values.reshape(groups, -1), filters, axis=0).T

    sums = tuple(range(kernel.ndim - 1))
    bias = bias + (kernel * along(affine.shift)).sum(sums)
    return kernel * along(affine.scale), bias


def scale_depthwise_input(kernel, affine):
    """The kernel of an affine map before a depthwise convolution without padding.

    Args:
        kernel: array of shape `(..., channels, multiplier)`.
        affine: an `Affine` per input channel.

    Returns:
        `(kernel, addend)`, where `addend`, of shape `(channels * multiplier,)`, is
        what the shift adds to the output.
    """
    sums = tuple(range(kernel.ndim - 2))
    addend = (kernel * affine.shift[:, None]).sum(sums)
    return kernel * affine.scale[:, None], addend.reshape(-1)


def scale_einsum_input(kernel, bias, affine, equation, axis):
    """The kernel and bias of an affine map before `einsum(equation, x, kernel) + bias`.

    Args:
        kernel: array.
        bias: array that broadcasts against the output.
        affine: an `Affine` along `axis` of the input.
        equation: without an ellipsis, as `"abc,cd->abd"`.
        axis: of the input, not negative.

    Returns:
        `(kernel, bias, labels)`, where `labels` are the letters of the output axes
        that the bias must have now.

    Raises:
        UnfoldableError: if the kernel has no such axis.
    """
    of_input, of_kernel, of_output = _parts(equation)
    label = of_input[axis]
    labels = [other for other in of_output if other in of_kernel]
    summed_alone = set(of_input) - set(of_kernel) - set(of_output)
    if label not in of_kernel or summed_alone or not labels:
        raise UnfoldableError(f"has no weights along axis {axis} of its input alone")
    addend = np.einsum(
        f"{of_kernel},{label}->{''.join(labels)}", kernel, affine.shift, optimize=True
    )
    sizes = dict(zip(of_kernel, kernel.shape, strict=True))
    trailing = of_output[of_output.index(labels[0]) :]
    addend = addend.reshape([sizes[o] if o in labels else 1 for o in trailing])
    along = [-1 if other == label else 1 for other in of_kernel]
    return kernel * affine.scale.reshape(along), bias + addend, set(labels)


def _parts(equation):
    inputs, output = equation.split("->")
    return (*inputs.split(","), output)


class Linear:
    """A linear layer: where its channels are, and its weights to fold affine maps into.

    Args:
        layer: a built layer that `linear` knows.
        rank: the rank of its input; None where only its kernels matter.

    `arrays` holds the weights in float64, by the names of the layer's attributes.
    """

    # The kernels, in the order in which they are applied.
    names: tuple[str, ...] = ("kernel",)
    # Whether each channel of the input has weights of its own, at every position.
    has_input_channels = True

    def __init__(self, layer, rank=None):
        self.layer, self.rank = layer, rank

    @functools.cached_property
    def arrays(self):
        weights = {name: getattr(self.layer, name) for name in [*self.names, "bias"]}
        arrays = {name: float64(w) for name, w in weights.items() if w is not None}
        return {"bias": np.zeros(()), **arrays}

    @property
    def last(self):
        """The name of the kernel that scales the output."""
        return self.names[-1]

    def channel_axis(self, rank):
        """The axis of the channels in an input or output of this rank."""
        return rank - 1

    def channel_axes(self, name):
        """The axes of a kernel that are output channels, ascending and not negative."""
        return (len(getattr(self.layer, name).shape) - 1,)

    def along_kernel(self):
        """The shape in which values per output channel broadcast to the last kernel."""
        return (-1,)

    def scaled(self, kernel, scale, xp=np):
        """The last kernel times a scale for each output channel.

        Args:
            kernel: array or tensor of its shape.
            scale: of shape `(channels,)`.
            xp: as in `as_matrix`.
        """
        return kernel * xp.reshape(scale, self.along_kernel())

    def as_matrix(self, name, kernel, xp=np):
        """A kernel with its output channels along the second of two axes.

        Args:
            name: of the kernel.
            kernel: array or tensor of its shape.
            xp: the module for it, NumPy or `keras.ops`.

        Returns:
            `(matrix, back)`: of shape `(others, channels)`, and a function that gives a
            matrix the shape of the kernel.
        """
        axes = self.channel_axes(name)
        others = [axis for axis in range(len(kernel.shape)) if axis not in axes]
        order = [*others, *axes]
        shape = [kernel.shape[axis] for axis in order]
        channels = math.prod(kernel.shape[axis] for axis in axes)
        if order == sorted(order):
            return xp.reshape(kernel, (-1, channels)), lambda m: xp.reshape(m, shape)

        def back(matrix):
            return xp.transpose(xp.reshape(matrix, shape), np.argsort(order).tolist())

        return xp.reshape(xp.transpose(kernel, order), (-1, channels)), back

    def unit_kernels(self, name):
        """Kernels with which the layer gives what the weights of one are multiplied by.

        Args:
            name: of the kernel.

        Returns:
            `(kernels, groups)`: dict by name, of this kernel and those after it. The
            output has `groups * weights` channels, where each output channel has so
            many weights, and the channels of a group have the same inputs.
        """
        kernel = getattr(self.layer, name)
        axes, shape = self.channel_axes(name), list(kernel.shape)
        groups = shape[axes[0]] if len(axes) > 1 else getattr(self.layer, "groups", 1)
        size = math.prod(n for axis, n in enumerate(shape) if axis not in axes)
        shape[axes[-1]] = size if len(axes) > 1 else size * groups
        _, back = self.as_matrix(name, np.empty(shape))
        kernels = {name: back(np.tile(np.eye(size), groups))}
        if name != self.last:
            ones = [1] * (len(shape) - 2)
            kernels[self.last] = np.eye(size * groups).reshape(*ones, size * groups, -1)
        return kernels, groups

    def along_output(self, axes):
        """The shapes in which values per output channel broadcast to the weights.

        Args:
            axes: the channel axes of the output.

        Returns:
            `(for the last kernel, for the bias)`.

        Raises:
            UnfoldableError: if the weights have no such axes.
        """
        raise NotImplementedError

    def fold_output(self, affine, axes):
        """Take in an `Affine` along the given axes of the output."""
        for_kernel, for_bias = self.along_output(axes)
        self.arrays[self.last] = self.arrays[self.last] * affine.scale.reshape(
            for_kernel
        )
        scale, shift = (values.reshape(for_bias) for values in affine)
        self.arrays["bias"] = self.arrays["bias"] * scale + shift

    def fold_input(self, affine, axes):
        """Take in an `Affine` along the given axes of the input."""
        raise NotImplementedError

    def as_convolution(self, axis):
        """The layer as a convolution of groups, with channels on an axis.

        Returns:
            `(kernel, bias, groups)`: the kernel of shape `(..., channels // groups,
            filters)`, with an axis for each that the layer has a size along.

        Raises:
            UnfoldableError: if it is none.
        """
        kind = type(self.layer).__name__
        raise UnfoldableError(f"is of type {kind}, which `fold` does not add to others")

    def take_convolution(self, kernel, bias):
        """Take other values, as `as_convolution` gives them."""
        self.arrays["kernel"] = kernel.reshape(self.arrays["kernel"].shape)
        self.arrays["bias"] = bias

    def write(self, layer):
        """Assign the arrays to a copy of the layer; add a bias if it has none."""
        if layer.bias is None or layer.bias.shape != self.arrays["bias"].shape:
            give_bias(layer, self.arrays["bias"].shape)
        for name, value in self.arrays.items():
            getattr(layer, name).assign(value)


class _Einsum(Linear):
    """EinsumDense."""

    has_input_channels = False

    def __init__(self, layer, rank=None):
        super().__init__(layer, rank)
        self._labels = set(getattr(layer, "bias_axes", None) or "")

    @functools.cached_property
    def _equation(self):
        """The equation, with letters in the place of an ellipsis."""
        equation = getattr(self.layer, "equation", "...a,ab->...b")
        inputs = equation.split(",")[0].replace("...", "")
        free = [letter for letter in string.ascii_letters if letter not in equation]
        return equation.replace("...", "".join(free[: self.rank - len(inputs)]))

    def channel_axes(self, name):
        _, of_kernel, of_output = _parts(self.layer.equation)
        return tuple(i for i, label in enumerate(of_kernel) if label in of_output)

    def along_kernel(self):
        _, of_kernel, of_output = _parts(self.layer.equation)
        return [-1 if label == of_output[-1] else 1 for label in of_kernel]

    def along_output(self, axes):
        _, of_kernel, of_output = _parts(self._equation)
        axis = _only(axes)
        label = of_output[axis]
        if label not in of_kernel:
            raise UnfoldableError(f"has no weights along axis {axis} of its output")
        along = [-1 if other == label else 1 for other in of_kernel]
        return along, [-1, *[1] * (len(of_output) - 1 - axis)]

    def fold_output(self, affine, axes):
        super().fold_output(affine, axes)
        self._labels |= {_parts(self._equation)[-1][_only(axes)]}

    def fold_input(self, affine, axes):
        self.arrays["kernel"], self.arrays["bias"], labels = scale_einsum_input(
            self.arrays["kernel"],
            self.arrays["bias"],
            affine,
            self._equation,
            _only(axes),
        )
        self._labels |= labels

    def write(self, layer):
        super().write(layer)
        if isinstance(layer, layers.EinsumDense):
            output = _parts(self._equation)[-1]
            layer.bias_axes = "".join(c for c in output if c in self._labels)


class _Dense(_Einsum):
    """Dense, an einsum over the last axis of its input."""

    has_input_channels = True

    def channel_axes(self, name):
        return (1,)

    def along_kernel(self):
        return (-1,)

    def as_convolution(self, axis):
        if axis != self.rank - 1:
            raise UnfoldableError(f"has no weights along axis {axis} of its input")
        return self.arrays["kernel"], self.arrays["bias"], 1


class _Convolution(Linear):
    """Convolutions of any rank, with groups."""

    def channel_axis(self, rank):
        return 1 if self.layer.data_format == "channels_first" else rank - 1

    def along_output(self, axes):
        self._check_channels(axes)
        return self.along_kernel(), (-1,)

    def fold_input(self, affine, axes):
        self._check_channels(axes)
        self._check_padding(affine)
        self.take_input(affine)

    def take_input(self, affine):
        """Take in an `Affine` per channel of the input, whatever happens at borders."""
        self.arrays["kernel"], self.arrays["bias"] = scale_convolution_input(
            self.arrays["kernel"], self.arrays["bias"], affine, self.layer.groups
        )

    def as_convolution(self, axis):
        self._check_channels((axis,))
        return self.arrays["kernel"], self.arrays["bias"], self.layer.groups

    def _check_channels(self, axes):
        axis = self.channel_axis(self.rank)
        if axes != (axis,):
            raise UnfoldableError(f"has its channels on axis {axis}")

    def _check_padding(self, affine):
        layer = self.layer
        pads = layer.padding != "valid" and max(layer.kernel_size) > 1
        if pads and affine.shift.any():
            raise UnfoldableError(
                "pads with zeros; after folding, it would have to pad with -shift/scale"
            )


class _Transpose(_Convolution):
    has_input_channels = False
    as_convolution = Linear.as_convolution

    def channel_axes(self, name):
        return (len(getattr(self.layer, name).shape) - 2,)

    def along_kernel(self):
        return -1, 1

    def fold_input(self, affine, axes):
        raise UnfoldableError("sums over fewer inputs at its borders")


class _Depthwise(_Convolution):
    def channel_axes(self, name):
        return _last_two(getattr(self.layer, name))

    def along_kernel(self):
        return tuple(self.layer.kernel.shape[-2:])

    def take_input(self, affine):
        kernel, addend = scale_depthwise_input(self.arrays["kernel"], affine)
        self.arrays["kernel"] = kernel
        self.arrays["bias"] = self.arrays["bias"] + addend

    def as_convolution(self, axis):
        self._check_channels((axis,))
        *places, channels, _ = self.arrays["kernel"].shape
        kernel = self.arrays["kernel"].reshape(*places, 1, -1)
        return kernel, self.arrays["bias"], channels


class _Separable(_Convolution):
    names = ("depthwise_kernel", "pointwise_kernel")
    as_convolution = Linear.as_convolution

    def channel_axes(self, name):
        kernel = getattr(self.layer, name)
        return super().channel_axes(name) if name == self.last else _last_two(kernel)

    def take_input(self, affine):
        kernel, addend = scale_depthwise_input(self.arrays["depthwise_kernel"], affine)
        pointwise = self.arrays["pointwise_kernel"]
        self.arrays["depthwise_kernel"] = kernel
        self.arrays["bias"] = self.arrays["bias"] + addend @ pointwise.reshape(
            len(addend), -1
        )


def _last_two(kernel):
    rank = len(kernel.shape)
    return rank - 2, rank - 1


class Normalization(Linear):
    """A batch normalization in inference, which is an affine map itself."""

    def __init__(self, layer, rank):
        super().__init__(layer, rank)
        self.affine = inference(layer)

    @property
    def axes(self):
        """The channel axes, not negative and ascending."""
        return tuple(sorted(axis % self.rank for axis in axes_of(self.layer)))

    def fold_output(self, affine, axes):
        self._check(axes)
        scale, shift = affine
        self.affine = Affine(
            self.affine.scale * scale, self.affine.shift * scale + shift
        )

    def fold_input(self, affine, axes):
        self._check(axes)
        scale, shift = self.affine
        self.affine = Affine(scale * affine.scale, scale * affine.shift + shift)

    def along_output(self, axes):
        self._check(axes)
        return (-1,), (-1,)

    def as_convolution(self, axis):
        self._check((axis,))
        return self.affine.scale[None], self.affine.shift, self.affine.scale.size

    def _check(self, axes):
        if axes != self.axes:
            raise UnfoldableError(f"has its channels on axis {self.layer.axis}")

    def write(self, layer):
        """Assign the affine map to a copy of the layer that has gamma and beta."""
        mean, rstd = _statistics(self.layer)
        layer.gamma.assign(self.affine.scale / rstd)
        layer.beta.assign(self.affine.shift + mean * self.affine.scale)


def inference(layer):
    """What a batch normalization does in inference, as an `Affine`.

    Args:
        layer: a built layer, ours or Keras's.

    Returns:
        The `Affine`, one value per channel.

    Raises:
        UnfoldableError: if its moving statistics are invalid.
    """
    mean, rstd = _statistics(layer)
    if not (np.isfinite(mean) & np.isfinite(rstd)).all():
        raise UnfoldableError("has moving statistics that are not finite, or negative")
    gamma = 1.0 if layer.gamma is None else float64(layer.gamma)
    beta = 0.0 if layer.beta is None else float64(layer.beta)
    return Affine(gamma * rstd, beta - gamma * rstd * mean)


def _statistics(layer):
    variance = float64(layer.moving_variance) + layer.epsilon
    with np.errstate(invalid="ignore", divide="ignore"):
        return float64(layer.moving_mean), 1.0 / np.sqrt(variance)


def _only(axes):
    if len(axes) > 1:
        raise UnfoldableError("has no weights along several axes at once")
    return axes[0]


_FAMILIES = {
    layers.Dense: _Dense,
    layers.EinsumDense: _Einsum,
    layers.Conv1D: _Convolution,
    layers.Conv2D: _Convolution,
    layers.Conv3D: _Convolution,
    layers.Conv1DTranspose: _Transpose,
    layers.Conv2DTranspose: _Transpose,
    layers.Conv3DTranspose: _Transpose,
    layers.DepthwiseConv1D: _Depthwise,
    layers.DepthwiseConv2D: _Depthwise,
    layers.SeparableConv1D: _Separable,
    layers.SeparableConv2D: _Separable,
}


def linear(layer, rank=None):
    """The `Linear` of a layer with an input of this rank; None if it isn't linear.

    A subclass counts as not linear, since it may compute something else.
    """
    if is_normalization(layer):
        return Normalization(layer, rank)
    family = _FAMILIES.get(type(layer))
    return None if family is None else family(layer, rank)


def is_activated(layer):
    """Whether a layer applies an activation that is not linear."""
    return getattr(layer, "activation", None) not in (None, activations.linear)


def has_input_channels(layer):
    """Whether each channel of a layer's input has weights of its own, at all places."""
    return getattr(_FAMILIES.get(type(layer)), "has_input_channels", False)


def is_linear(layer):
    """Whether `linear` knows the layer."""
    return is_normalization(layer) or type(layer) in _FAMILIES


def call_with(layer, attributes, inputs, **options):
    """What a layer computes with other values of some attributes, as of its weights.

    Args:
        layer: a layer, which does not change.
        attributes: dict of values by name.
        inputs, **options: the arguments of the call.
    """
    return type(layer).call(_With(layer, attributes), inputs, **options)


class _With:
    """A layer with other values of some attributes."""

    def __init__(self, layer, attributes):
        self._layer = layer
        vars(self).update(attributes)

    def __getattr__(self, name):
        return getattr(self._layer, name)
