"""NumPy arrays from what Keras holds, and the axes and statistics of a layer."""

import contextlib

import keras
import numpy as np


def float64(value) -> np.ndarray:
    """A variable, tensor, array or number as an array of float64."""
    return np.asarray(keras.ops.convert_to_numpy(value), "float64")


def axes(layer) -> list:
    """The channel axes of a normalization in a list, with the given signs."""
    return list(layer.axis) if isinstance(layer.axis, list | tuple) else [layer.axis]


def moving(layer) -> tuple[np.ndarray, np.ndarray]:
    """The moving mean and variance of a normalization, as arrays of float64."""
    return float64(layer.moving_mean), float64(layer.moving_variance)


def is_initial(layer) -> bool:
    """Whether the moving statistics of a normalization are still the initial ones."""
    mean, variance = moving(layer)
    first_mean = float64(layer.moving_mean_initializer(mean.shape))
    first_variance = float64(layer.moving_variance_initializer(variance.shape))
    same = np.array_equal(mean, first_mean)
    return same and np.array_equal(variance, first_variance)


@contextlib.contextmanager
def restored(variables):
    """Give variables their values back after the block."""
    give_back = _giving_back(variables)
    try:
        yield
    finally:
        give_back()


@contextlib.contextmanager
def rolled_back(variables):
    """Give variables their values back if the block fails or is interrupted."""
    give_back = _giving_back(variables)
    try:
        yield
    except BaseException:
        give_back()
        raise


def _giving_back(variables):
    """A function that gives variables the values that they have now."""
    variables = list(variables)
    before = [keras.ops.convert_to_numpy(variable) for variable in variables]

    def give_back():
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)

    return give_back
