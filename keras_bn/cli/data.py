"""Reading the inputs of a model from an `.npz` file."""

import numpy as np

from keras_bn.cli.errors import UsageError, refused


def read_data(file, model):
    """The inputs of a model, and the labels if there are any.

    Args:
        file: the path of an `.npz` file. It holds one array, or `x`, or arrays named as
            the inputs of the model; labels are in `y`.
        model: the model.

    Returns:
        The inputs, an array or a dict of arrays, and the labels or None.

    Raises:
        UsageError: if the file does not suit the model.
    """
    arrays = _arrays(file)
    inputs = _inputs(file, arrays, model)
    labels = arrays.get("y")
    if any(labels is x for x in inputs.values()):
        labels = None
    _check(file, {**inputs, **({} if labels is None else {"y": labels})})
    return inputs if len(inputs) > 1 else next(iter(inputs.values())), labels


def _arrays(file):
    # A broken file may fail in zipfile, in zlib or in NumPy.
    with refused(Exception, saying=f"{file} can't be read: "):
        opened = np.load(file, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError(
                "it is one array (.npy); write it with np.savez(file, x=x)"
            )
        with opened:
            return {name: opened[name] for name in opened.files}


def _inputs(file, arrays, model):
    """The arrays for the inputs of the model, by name; refuses wrong ones."""
    tensors = getattr(model, "inputs", None) or []
    if len(tensors) < 2:
        names = ["x", *(tensor.name for tensor in tensors)]
        chosen = [name for name in names if name in arrays][:1] or list(arrays)
        if len(chosen) != 1:
            raise UsageError(
                f"{file} must hold one array, or one called {' or '.join(names)}, not "
                f"{', '.join(arrays) or 'none'}"
            )
        taken = {chosen[0]: tensors[0] if tensors else None}
    else:
        taken = {tensor.name: tensor for tensor in tensors}
        if missing := [name for name in taken if name not in arrays]:
            raise UsageError(
                f"{file} lacks an array for the input {', '.join(missing)}; it holds "
                f"{', '.join(arrays) or 'none'}"
            )
    for name, tensor in taken.items():
        if tensor is not None and not _fits(arrays[name].shape, tensor.shape):
            raise UsageError(
                f"{name} in {file} has the shape {arrays[name].shape}, and the model "
                f"takes {tuple(tensor.shape)}"
            )
    return {name: arrays[name] for name in taken}


def _fits(shape, expected):
    # Keras adds a last axis of size 1 to (batch,).
    if len(shape) == 1 and tuple(expected[1:]) == (1,):
        return True
    return len(shape) == len(expected) and all(
        want in (None, size) for size, want in zip(shape, expected, strict=True)
    )


def _check(file, arrays):
    """Refuse arrays without numbers, and unequal numbers of samples."""
    for name, array in arrays.items():
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
            raise UsageError(f"{name} in {file} holds no numbers but {array.dtype}")
        if array.ndim == 0 or not len(array):
            raise UsageError(f"{name} in {file} holds no samples")
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise UsageError(f"{file} holds unequal numbers of samples: {said}")
