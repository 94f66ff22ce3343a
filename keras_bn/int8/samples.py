"""Samples for a file of integers: batches of the size that it takes."""

import keras
import numpy as np

from keras_bn.passes.data import batches
from keras_bn.surgery.calls import as_list
from keras_bn.surgery.graph import graph_of


def samples_of(model, data, steps=None, batch_size=None):
    """The inputs in the data, as the file takes them, and the labels.

    Returns:
        `(samples, labels)`: a list of batches of the size that the model fixes, or of
        one sample, each a list of arrays in the order of the model's inputs; and the
        labels of all of them, as the data has them, None without.

    Raises:
        ValueError: if there are none.
    """
    size = batch_of(model)
    with_labels = data if isinstance(data, tuple) else (data,)
    parts = [
        (in_order(model, x), y)
        for x, y, _ in batches(*with_labels, steps=steps, batch_size=batch_size)
    ]
    if not parts:
        raise ValueError("There is no data: not one batch came.")
    inputs, labels = zip(*parts, strict=True)
    if size == 1:
        samples = [
            [array[i : i + 1] for array in arrays]
            for arrays in inputs
            for i in range(len(arrays[0]))
        ]
    else:
        whole = [np.concatenate(arrays) for arrays in zip(*inputs, strict=True)]
        samples = [
            [array[i : i + size] for array in whole]
            for i in range(0, len(whole[0]) - size + 1, size)
        ]
        if not samples:
            raise ValueError(
                f"'{model.name}' takes {size} samples at once, and the data has "
                f"{len(whole[0])}."
            )
    if any(y is None for y in labels):
        return samples, None
    return samples, keras.tree.map_structure(
        lambda *arrays: np.concatenate(arrays)[: size * len(samples)], *labels
    )


def batch_of(model):
    """The batch size that a model fixes, or 1."""
    return graph_of(model).inputs[0].shape[0] or 1


def in_order(model, x):
    """A batch as a list of arrays, in the order of the model's inputs."""
    return [keras.ops.convert_to_numpy(array) for array in as_list(model, x)]


def example_of(model):
    """Arrays of the shapes that a model takes.

    Raises:
        ValueError: if a size is not known.
    """
    tensors = graph_of(model).inputs
    for tensor in tensors:
        if None in tensor.shape[1:]:
            raise ValueError(
                f"The input '{tensor.name}' has the shape {tuple(tensor.shape)}, and a "
                "file needs every size. Give `data` of the size that it is to take."
            )
    size = batch_of(model)
    return [np.zeros((size, *tensor.shape[1:]), tensor.dtype) for tensor in tensors]


def random_samples(interpreter, example, names, count, seed=0):
    """Random samples, spread over the ranges of the inputs."""
    rng, kinds = np.random.default_rng(seed), interpreter.inputs()

    def one(array, name):
        scale, zero_point, dtype = kinds[name]
        if not scale:
            return rng.integers(0, 2, array.shape).astype(array.dtype)
        bounds = np.iinfo(dtype)
        values = rng.integers(bounds.min, bounds.max + 1, array.shape)
        return ((values - zero_point) * scale).astype(array.dtype)

    return [
        [one(array, name) for array, name in zip(example, names, strict=True)]
        for _ in range(count)
    ]
