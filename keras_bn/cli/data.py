"""Reading data for a model: from a file, a folder, or a function of the user's."""

import contextlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_bn.cli.checks import function_name
from keras_bn.cli.errors import UsageError, refused
from keras_bn.cli.modules import imported_function
from keras_bn.passes.data import finite_samples

_X, _Y = ("x", "x_train"), ("y", "y_train")
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
_SAVED = "dataset_spec.pb"  # what tf.data.Dataset.save writes


class Data(NamedTuple):
    """What `--data` gives.

    Args:
        inputs: an array, a dict of arrays by the names of the model's inputs, or
            anything else that `fit` takes as its `x`, which then has the labels.
        labels: an array, or None.
    """

    inputs: Any
    labels: np.ndarray | None = None

    def whole(self):
        """Inputs and labels, as `keras_bn.diagnose` takes them."""
        return self.inputs if self.labels is None else (self.inputs, self.labels)

    def without_labels(self):
        """The inputs, as `keras_bn.recalibrate` takes them."""
        return self.inputs[0] if isinstance(self.inputs, tuple) else self.inputs

    def in_arrays(self):
        """Whether the inputs are arrays, which have no batches of their own."""
        inputs = self.without_labels()
        return all(isinstance(x, np.ndarray) for x in keras.tree.flatten(inputs))

    def shuffled(self):
        """The same in a random order, if it is in arrays.

        Samples that are not finite keep their places, by which findings name them.
        """
        if not self.in_arrays() or isinstance(self.inputs, tuple):
            return self
        finite = finite_samples(self.whole())
        order = np.arange(len(finite))
        order[finite] = np.random.default_rng(0).permutation(order[finite])
        inputs = keras.tree.map_structure(lambda array: array[order], self.inputs)
        return Data(inputs, None if self.labels is None else self.labels[order])


@contextlib.contextmanager
def passing(arguments, data):
    """A pass over the data of a command.

    Whatever a model raises becomes one sentence, and what it prints goes to stderr, as
    the bar of progress does.

    Yields:
        The options of the pass.
    """
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    options = {
        "steps": arguments.steps,
        "batch_size": arguments.batch_size if data.in_arrays() else None,
        "verbose": "auto" if on_terminal and not arguments.quiet else 0,
    }
    what = f"the model can't be run on {arguments.data}: "
    with refused(Exception, saying=what), contextlib.redirect_stdout(sys.stderr):
        yield options


def read_data(arguments, model):
    """The data of a command.

    Args:
        arguments: of the command: `data`, `x`, `y` and `batch_size`.
        model: the model that it is for.

    Returns:
        A `Data`.

    Raises:
        UsageError: if it does not suit the model.
    """
    place = arguments.data
    if name := function_name(place):
        return _called(name)
    if Path(place).is_dir():
        if Path(place, _SAVED).exists():
            return _saved_dataset(place, model, arguments.batch_size)
        return _images(place, model, arguments.batch_size)
    return _from_arrays(arguments, model)


def _called(name):
    """What a function of the user's returns; what it prints goes to stderr."""
    saying = f"--data {name} fails: "
    with refused(Exception, saying=saying), contextlib.redirect_stdout(sys.stderr):
        data = imported_function(name)()
    if data is None:
        raise UsageError(f"--data {name} returns None instead of data")
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], np.ndarray):
        return Data(*data)
    return Data(data)


def _saved_dataset(place, model, batch_size):
    """A folder that `tf.data.Dataset.save` wrote, of batches or of single samples."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UsageError(
            f"{place} is a tf.data.Dataset, and TensorFlow is not installed"
        ) from error
    with refused(Exception, saying=f"{place} can't be read: "):
        dataset = tf.data.Dataset.load(place)
        spec = dataset.element_spec
        inputs = spec[0] if isinstance(spec, tuple) else spec
        ranks = [tensor.shape.rank for tensor in tf.nest.flatten(inputs)]
        expected = [len(tensor.shape) for tensor in _tensors(model)]
        if expected and [rank + 1 for rank in ranks] == expected:
            dataset = dataset.batch(batch_size)
    return Data(dataset)


def _images(place, model, batch_size):
    """A folder of images, with a folder for each class if there are classes."""
    folder = Path(place)
    classes = [path for path in folder.iterdir() if path.is_dir()]
    if not any(path.suffix.lower() in _IMAGES for path in folder.rglob("*")):
        raise UsageError(
            f"{place} holds no images ({', '.join(_IMAGES)}), and is not what "
            "tf.data.Dataset.save writes"
        )
    shapes = [tuple(tensor.shape[1:]) for tensor in _tensors(model)]
    if len(shapes) != 1 or len(shapes[0]) != 3:
        raise UsageError(
            f"{place} holds images, and '{model.name}' takes no single image"
        )
    # Keras's default; a model that says otherwise says so in its first convolution.
    layout = keras.config.image_data_format()
    *size, channels = shapes[0]
    if layout == "channels_first":
        channels, *size = shapes[0]
    modes = {1: "grayscale", 3: "rgb", 4: "rgba"}
    if channels not in modes or None in size:
        raise UsageError(
            f"{place} holds images, and '{model.name}' takes inputs of shape "
            f"{shapes[0]}: --data module:function can prepare them"
        )
    with refused(Exception, saying=f"{place} can't be read: "):
        return Data(
            keras.utils.image_dataset_from_directory(
                place,
                labels="inferred" if classes else None,
                label_mode=_label_mode(model) if classes else None,
                color_mode=modes[channels],
                batch_size=batch_size,
                image_size=tuple(size),
                seed=0,
                verbose=False,
            )
        )


def _label_mode(model):
    """How the loss of a model wants its labels."""
    loss = getattr(model, "loss", None)
    name = getattr(loss, "name", None) or getattr(loss, "__name__", None) or str(loss)
    if "binary" in name.lower():
        return "binary"
    return "categorical" if name.lower().startswith("categorical") else "int"


def _from_arrays(arguments, model):
    file = arguments.data
    arrays = _arrays(file)
    inputs = _inputs(arguments, arrays, model)
    labels = _labels(arguments, arrays, inputs)
    _check(file, {**inputs, **({} if labels is None else {"y": labels})})
    return Data(inputs if len(inputs) > 1 else next(iter(inputs.values())), labels)


def _arrays(file):
    try:
        opened = np.load(file, allow_pickle=False)
    except Exception as error:  # a broken file may fail in zipfile, zlib or NumPy
        raise UsageError(
            f"{file} can't be read: it is no .npz or .npy file, or it is damaged"
        ) from error
    if isinstance(opened, np.ndarray):
        return {"x": opened}
    arrays = {}
    with opened:
        for name in opened.files:
            try:
                arrays[name] = opened[name]
            except ValueError as error:
                raise UsageError(
                    f"{name} in {file} holds Python objects, not numbers"
                ) from error
            except Exception as error:
                raise UsageError(f"{file} can't be read: it is damaged") from error
    return arrays


def _inputs(arguments, arrays, model):
    """The arrays for the inputs of the model, by name; refuses wrong ones."""
    file, tensors = arguments.data, _tensors(model)
    if len(tensors) < 2:
        name = _chosen(arguments, arrays, "x", [*_X, *(t.name for t in tensors)])
        chosen = {name: tensors[0] if tensors else None}
    elif arguments.x is not None:
        raise UsageError(f"--x is for models of one input; this has {len(tensors)}")
    else:
        chosen = {tensor.name: tensor for tensor in tensors}
        if missing := [name for name in chosen if name not in arrays]:
            raise UsageError(
                f"{file} lacks an array for the input {', '.join(missing)}; it holds "
                f"{', '.join(arrays) or 'none'}"
            )
    for name, tensor in chosen.items():
        if tensor is not None and not _fits(arrays[name].shape, tensor.shape):
            raise UsageError(
                f"{name} in {file} has the shape {arrays[name].shape}, and the model "
                f"takes {tuple(tensor.shape)}"
            )
    return {name: arrays[name] for name in chosen}


def _labels(arguments, arrays, inputs):
    names = _Y if arguments.y is None else [arguments.y]
    if arguments.y is not None and arguments.y not in arrays:
        raise UsageError(
            f"{arguments.data} holds no {arguments.y}, but {', '.join(arrays)}"
        )
    return next((arrays[n] for n in names if n in arrays and n not in inputs), None)


def _chosen(arguments, arrays, option, names):
    """The name of the array to take."""
    name = getattr(arguments, option)
    if name is not None:
        names = [name]
    present = [n for n in names if n in arrays][:1]
    if name is None:
        present = present or list(arrays)
    if len(present) != 1:
        either = f"one called {' or '.join(names)}"
        raise UsageError(
            f"{arguments.data} must hold {'' if name else 'one array, or '}{either}, "
            f"not {', '.join(arrays) or 'none'}{'' if name else '; or give --x NAME'}"
        )
    return present[0]


def _tensors(model):
    return getattr(model, "inputs", None) or []


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
        words = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise UsageError(f"{file} holds unequal numbers of samples: {words}")
