"""Where the channels of a kernel are: the output channels have a scale each in int8."""

import keras
import numpy as np
from keras import layers

_TRANSPOSES = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)


def names(layer):
    """The names of the kernels of a linear layer, in the order of computing."""
    if isinstance(layer, _SEPARABLE):
        return "depthwise_kernel", "pointwise_kernel"
    return ("kernel",)


def is_transpose(layer):
    """Whether a layer is a transposed convolution."""
    return isinstance(layer, _TRANSPOSES)


def channel_axes(layer, name):
    """The axes of a kernel that are output channels, ascending and not negative.

    Args:
        layer: a built linear layer.
        name: of the kernel, from `names`.
    """
    rank = len(getattr(layer, name).shape)
    if isinstance(layer, layers.EinsumDense):
        of_kernel = layer.equation.split("->")[0].split(",")[1]
        of_output = layer.equation.split("->")[1]
        return tuple(i for i, label in enumerate(of_kernel) if label in of_output)
    if isinstance(layer, _TRANSPOSES):
        return (rank - 2,)
    if isinstance(layer, _DEPTHWISE) or name == "depthwise_kernel":
        return rank - 2, rank - 1
    return (rank - 1,)


def as_matrix(layer, name, kernel, xp=np):
    """A kernel with its output channels along the second of two axes.

    Args:
        layer, name: as in `channel_axes`.
        kernel: array or tensor of the shape of the layer's kernel.
        xp: the module for it, NumPy or `keras.ops`.

    Returns:
        `(matrix, back)`: of shape `(others, channels)`, and a function that gives a
        matrix the shape of the kernel.
    """
    axes = channel_axes(layer, name)
    others = [axis for axis in range(len(kernel.shape)) if axis not in axes]
    order = [*others, *axes]
    shape = [kernel.shape[axis] for axis in order]
    channels = int(np.prod([kernel.shape[axis] for axis in axes]))

    def back(matrix):
        return xp.transpose(xp.reshape(matrix, shape), np.argsort(order).tolist())

    if order == sorted(order):
        return xp.reshape(kernel, (-1, channels)), lambda m: xp.reshape(m, shape)
    return xp.reshape(xp.transpose(kernel, order), (-1, channels)), back


def scaled(layer, name, kernel, scale, xp=np):
    """A kernel times a scale for each channel of the output's channel axis.

    Args:
        layer, name, kernel, xp: as in `as_matrix`.
        scale: of shape `(channels,)`; for EinsumDense, along the output's last axis.
    """
    if isinstance(layer, layers.EinsumDense):
        operands, of_output = layer.equation.split("->")
        of_kernel = operands.split(",")[1]
        shape = [-1 if label == of_output[-1] else 1 for label in of_kernel]
        return kernel * xp.reshape(scale, shape)
    matrix, back = as_matrix(layer, name, kernel, xp)
    return back(matrix * scale)


def rounded(layer, name, kernel, bits=8):
    """A kernel as int8 keeps it: symmetric, with a scale for each output channel.

    Args:
        layer, name: as in `channel_axes`.
        kernel: array.
        bits: of each weight.

    Returns:
        An array of the shape of the kernel.
    """
    matrix, back = as_matrix(layer, name, kernel)
    scale = np.abs(matrix).max(0) / (2 ** (bits - 1) - 1)
    scale = np.where(scale > 0, scale, 1.0)
    return back(np.rint(matrix / scale) * scale)


def input_range(layer, kernels):
    """The largest weight of each input channel.

    Args:
        layer: Dense, or a convolution of any kind but a transpose.
        kernels: the arrays of the layer by name.

    Returns:
        An array of shape `(channels,)`.
    """
    kernel = np.abs(kernels[names(layer)[0]])
    if isinstance(layer, _DEPTHWISE + _SEPARABLE):
        return kernel.max(tuple(i for i in range(kernel.ndim) if i != kernel.ndim - 2))
    groups = getattr(layer, "groups", 1)
    *_, per_group, filters = kernel.shape
    kernel = kernel.reshape(-1, per_group, groups, filters // groups)
    return kernel.max((0, 3)).T.reshape(-1)


def output_range(layer, kernels):
    """The largest weight of each output channel, of shape `(channels,)`."""
    name = names(layer)[-1]
    return np.abs(as_matrix(layer, name, kernels[name])[0]).max(0)


def is_relu(operation):
    """The upper bound of a ReLU, infinity if it has none; None for anything else."""
    function = operation
    if isinstance(operation, layers.ReLU):
        if operation.negative_slope or operation.threshold:
            return None
        return np.inf if operation.max_value is None else float(operation.max_value)
    if isinstance(operation, layers.Activation):
        function = operation.activation
    if function is keras.activations.relu or type(function).__name__ == "Relu":
        return np.inf
    if function is keras.activations.relu6 or type(function).__name__ == "Relu6":
        return 6.0
    return None
