"""Kernels as int8 keeps them: each output channel has a scale of its own."""

import keras
import numpy as np
from keras import layers


def rounded(linear, name, kernel):
    """A kernel as int8 keeps it: symmetric, with a scale for each output channel.

    Args:
        linear: the `Linear` of the layer.
        name: of the kernel.
        kernel: array.

    Returns:
        An array of the shape of the kernel.
    """
    matrix, back = linear.as_matrix(name, kernel)
    scale = np.abs(matrix).max(0) / 127
    scale = np.where(scale > 0, scale, 1.0)
    return back(np.rint(matrix / scale) * scale)


def relu_limit(operation):
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
