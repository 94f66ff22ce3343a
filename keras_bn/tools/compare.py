"""Comparing the outputs of two models on random input."""

import keras
import numpy as np

# The size of an axis that the model leaves open: enough for most downsampling.
_OPEN = 64


def random_inputs(model, samples=4, seed=0):
    """Random input of the structure, shapes and dtypes that a model takes.

    Args:
        model: a Functional or Sequential model.
        samples: the batch size, unless the model fixes it.
        seed: of the random numbers.

    Returns:
        Arrays in the structure of the model's inputs: normal floats; as integers, 0
        and 1, which are in every vocabulary.

    Raises:
        ValueError: for a model without a known input, or with text input.
    """
    rng = np.random.default_rng(seed)

    def one(tensor):
        batch, *sizes = tensor.shape
        shape = (batch or samples, *(size or _OPEN for size in sizes))
        if keras.backend.is_float_dtype(tensor.dtype):
            return rng.normal(size=shape).astype(tensor.dtype)
        if "int" not in tensor.dtype and tensor.dtype != "bool":
            raise ValueError(f"No random input of dtype {tensor.dtype}")
        return rng.integers(0, 2, shape).astype(tensor.dtype)

    if isinstance(model, keras.Sequential):
        return one(model.inputs[0])
    if not getattr(model, "inputs", None):
        raise ValueError(f"'{model.name}' does not say what input it takes.")
    return keras.tree.map_structure(one, model.input)


def relative_difference(a, b):
    """The largest difference between two outputs, relative to their spread.

    Args:
        a, b: arrays or tensors, or equal structures of them.

    Returns:
        The largest |a − b| / std(a) over all outputs; NaN if something is not finite.

    >>> print(relative_difference(np.array([1.0, 3.0]), np.array([1.0, 3.1])).round(3))
    0.1
    """
    pairs = zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True)
    differences = []
    for first, second in pairs:
        first = np.asarray(keras.ops.convert_to_numpy(first), "float64")
        second = np.asarray(keras.ops.convert_to_numpy(second), "float64")
        spread = first.std() or 1.0
        differences.append(np.abs(first - second).max(initial=0.0) / spread)
    return np.max(differences)
