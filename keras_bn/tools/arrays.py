"""NumPy arrays from what Keras holds, and the axes of a layer."""

import keras
import numpy as np


def float64(value) -> np.ndarray:
    """A variable, tensor, array or number as an array of float64."""
    return np.asarray(keras.ops.convert_to_numpy(value), "float64")


def axes(layer) -> list:
    """The channel axes of a normalization in a list, with the given signs."""
    return list(layer.axis) if isinstance(layer.axis, list | tuple) else [layer.axis]
