"""Samples for a file of integers: batches of the size that it takes."""

import keras
import numpy as np

from keras_bn.passes.data import NoDataError, batches
from keras_bn.surgery.calls import as_list
from keras_bn.surgery.graph import graph_of

# Batches that go through a model at once.
_CHUNK = 8


def samples_of(model, data, steps=None, batch_size=None, labelled=False):
    """The inputs in the data, as the file takes them, and the labels if `labelled`.

    The inputs are a list of batches of the size that the model fixes, or of one sample,
    each a list of arrays in the order of the model's inputs. The labels are those of
    all of them, as the data has them; None without.
    """
    given = data if isinstance(data, tuple) else (data,)
    if not 1 <= len(given) <= 3:
        raise ValueError(
            "A tuple in `data` is `(x, y)` or `(x, y, sample_weight)`. Received: a "
            f"tuple of {len(given)}"
        )
    parts = [
        (in_order(model, x), y if labelled else None)
        for x, y, _ in batches(*given, steps=steps, batch_size=batch_size)
    ]
    if not parts:
        raise NoDataError
    inputs, labels = zip(*parts, strict=True)
    whole, size = joined(inputs), batch_of(model)
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
    try:
        return samples, keras.tree.map_structure(
            lambda *arrays: np.concatenate(arrays)[: size * len(samples)], *labels
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The labels of the batches in `data` do not make one array: {error}"
        ) from error


def at_once(samples):
    """Pairs of a list of batches, eight or fewer, and these as one."""
    for at in range(0, len(samples), _CHUNK):
        yield (chunk := samples[at : at + _CHUNK]), joined(chunk)


def joined(samples):
    """Batches as one, a list of arrays."""
    return [np.concatenate(arrays) for arrays in zip(*samples, strict=True)]


def batch_of(model):
    """The batch size that a model fixes, or 1."""
    return graph_of(model).inputs[0].shape[0] or 1


def in_order(model, x):
    """A batch as a list of arrays, in the order of the model's inputs."""
    arrays = [keras.ops.convert_to_numpy(array) for array in as_list(model, x)]
    if len(arrays) != (wanted := len(graph_of(model).inputs)):
        raise ValueError(
            f"'{model.name}' takes {wanted} inputs, as a list or a dict: a tuple in "
            f"`data` is `(x, y)`. Received: {len(arrays)} inputs"
        )
    return arrays


def example_of(model):
    """Arrays of the shapes that a model takes; refuses a model that leaves one open."""
    tensors = graph_of(model).inputs
    for tensor in tensors:
        if None in tensor.shape[1:]:
            raise ValueError(
                f"The input '{tensor.name}' has the shape {tuple(tensor.shape)}, and a "
                "file needs every size. Give `data` of the size that it is to take."
            )
    size = batch_of(model)
    return [np.zeros((size, *tensor.shape[1:]), tensor.dtype) for tensor in tensors]


def random_samples(tensors, example, count):
    """Random batches, spread over the ranges of the inputs of a file.

    `tensors` is what TFLite says of the inputs, and `example` has their shapes.
    """
    rng = np.random.default_rng(0)

    def one(tensor, array):
        scale, zero_point = tensor["quantization"]
        if not scale:
            return rng.integers(0, 2, array.shape).astype(array.dtype)
        bounds = np.iinfo(tensor["dtype"])
        values = rng.integers(bounds.min, bounds.max + 1, array.shape)
        return ((values - zero_point) * scale).astype(array.dtype)

    return [list(map(one, tensors, example)) for _ in range(count)]
