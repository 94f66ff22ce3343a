"""Shared by the commands on model files: opening and saving models."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import numpy as np

from keras_bn.cli import output
from keras_bn.cli.errors import UsageError, refused, sentence, warning_texts
from keras_bn.layer import BatchNormalization
from keras_bn.layer.stored import options_beside
from keras_bn.loading.load import holds_ours, layers_of_keras, load_model
from keras_bn.surgery.norms import normalizations
from keras_bn.surgery.view import ModelView
from keras_bn.tools.convert import to_keras

# Parts of Keras's message if it doesn't know a class or function of a file.
_UNKNOWN = ("Could not locate ", "custom_object_scope")


class Opened(NamedTuple):
    """A model from a file.

    Args:
        model: the model, with `keras_bn` layers.
        layers: its batch normalizations by path.
        native: whether the file has Keras's own layers, and none of keras_bn.
        notes: warnings from loading it.
        of_keras: the names of its layers that are Keras's own.
    """

    model: keras.Model
    layers: dict[str, keras.Layer]
    native: bool
    notes: list[str]
    of_keras: Collection[str] = ()


def open_model(arguments, normalized=True) -> Opened:
    """Load the model of a command.

    Args:
        arguments: of the command.
        normalized: whether the model must have a batch normalization.

    Raises:
        UsageError: if it cannot be loaded.
        SystemExit: with status 1 if the model needs a batch normalization and has none.
    """
    return open_file(arguments.model, normalized)


def open_file(file, normalized=True) -> Opened:
    """Load a model.

    Raises:
        UsageError, SystemExit: as `open_model`.
    """
    with refused(OSError, saying=f"{file} can't be read: "):
        _check_holds_model(file)
    try:
        with warning_texts() as notes:
            model = load_model(file)
        native, of_keras = not holds_ours(file), layers_of_keras(file)
    except Exception as error:  # Keras may raise anything for a file it can't read
        raise UsageError(_cause(file, error)) from error
    with refused(ValueError):
        layers = normalizations(model)
    if normalized and not layers:
        raise SystemExit(f"'{model.name}' has no batch normalization in it.")
    return Opened(model, layers, native, notes, of_keras)


def save(arguments, model, native=False, file=None):
    """Write a model, completely or not at all.

    Args:
        arguments: of the command.
        model: the model.
        native: whether to write Keras's own layers, as its file had them.
        file: where; the output of the command by default.

    Returns:
        A list of what the conversion to Keras's layers warns of.
    """
    notes: list[str] = []
    if native:
        with refused(ValueError, TypeError), warning_texts() as notes:
            model = to_keras(model)

    def write(path):
        model.save(path)
        _check_written(path, model)

    with warning_texts():
        output.write(arguments, file or arguments.output, write)
    return notes


def _check_written(path, model):
    """Refuse a file that cannot be loaded again, or gives another model.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        again = load_model(path)
    except ValueError as error:
        reason = sentence(error).removeprefix(f"{path} can't be loaded: ")
        raise ValueError(f"it could not be loaded again: {reason}") from error
    written, loaded = model.get_weights(), again.get_weights()
    if len(written) != len(loaded) or not all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(written, loaded, strict=True)
    ):
        raise ValueError("it gives other weights when it is loaded again")
    layers = ModelView(again).of_type(BatchNormalization)
    for name, layer in ModelView(model).of_type(BatchNormalization).items():
        options = options_beside(layer)
        if name in layers and options_beside(layers[name]) != options:
            raise ValueError(
                f"it does not keep {', '.join(options)} of '{name}'; a .keras file does"
            )


def channels(layer):
    """How many channels a layer has; a list of sizes for several axes."""
    sizes = tuple(layer.moving_mean.shape)
    return sizes[0] if len(sizes) == 1 else list(sizes)


def _check_holds_model(file):
    """Refuse a file that has only weights."""
    if not Path(file).is_file() or not h5py.is_hdf5(file):
        return
    with h5py.File(file) as opened:
        if "model_config" not in opened.attrs:
            raise UsageError(
                f"{file} holds weights and no model: load them into their model, and "
                "save that with model.save"
            )


def _cause(file, error):
    """What is wrong with a file, with advice if Keras doesn't know a class in it."""
    message = sentence(error)
    if any(words in message for words in _UNKNOWN):
        message = message.partition(". ")[0]  # the rest is advice for code
        message += "; --import MODULE imports the module that defines it"
    return message if file in message else f"{file} can't be loaded: {message}"
