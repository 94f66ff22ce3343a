"""Kernels as int8 keeps them, each weight by itself."""

import numpy as np


def rounded(kernel):
    """A kernel with its output channels last: the largest weight of each is 127."""
    scale = np.abs(kernel).max(tuple(range(kernel.ndim - 1))) / 127
    return np.rint(kernel / scale) * scale
