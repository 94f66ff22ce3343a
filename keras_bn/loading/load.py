"""Loading a saved Keras model straight into our layers."""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras

from keras_bn.layer import BatchNormalization
from keras_bn.layer.stored import invalid_channel, loading
from keras_bn.loading.compilation import modern_training
from keras_bn.loading.configs import (
    OURS,
    SyncBatchNormalization,
    is_code,
    modern,
    of_keras,
)
from keras_bn.pages.plain import sentence
from keras_bn.surgery.graph import walk
from keras_bn.surgery.norms import is_keras
from keras_bn.surgery.private import require
from keras_bn.tools.convert import convert

_HDF5 = b"\x89HDF\r\n\x1a\n"

# The entries of a `.keras` archive that Keras reads.
_CONFIG, _METADATA = "config.json", "metadata.json"
_READ = (_METADATA, "model.weights.h5", "model.weights.npz")
_ASSETS = "assets/"

# Keras's rule: an entry that is larger than this, and than 100 times what is stored of
# it, is a bomb. Assets go to the disk, all others into memory.
_FLOOR, _FLOOR_OF_ASSETS, _EXPANSION = 1 << 32, 1 << 28, 100


# In the sentences of Keras's TypeErrors, and not in those of Python.
_OF_KERAS = ("could not be ", "Could not ", "Unrecognized ", "Received")


def load_model(path: str | os.PathLike[str], **kwargs: Any) -> keras.Model:
    """Load a model that Keras 3 or Keras 2 saved, with `keras_bn` layers in it.

    Like `keras.saving.load_model`, with every BatchNormalization a `keras_bn` layer. It
    also loads files that Keras 3 cannot: those of Keras 2 say `axis: [3]`, and those of
    a model compiled on PyTorch name an optimizer that only trains there. Keras's safe
    mode is on by default: it refuses a file that would run code of its own.

    A model whose class makes its own layers gets them too, with the options that its
    `.keras` file has of them, such as `freeze_statistics`.

    If moving statistics are lost (NaN, infinite, a negative variance), it warns and
    names the layers; `keras_bn.recalibrate` fixes the model.
    `keras.saving.load_model` refuses such a file with `keras_bn` layers.

    Args:
        path: a `.keras` or `.h5` file.
        **kwargs: arguments of `keras.saving.load_model`: `custom_objects`,
            `compile`, `safe_mode`.

    Returns:
        The model, compiled if it was saved so.

    Raises:
        FileNotFoundError: if there is no file at `path`.
        ValueError: for a file that is not a Keras model, or that Keras refuses.

    Example:

    >>> import tempfile, keras, keras_bn
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.BatchNormalization(name="bn")]
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(f"{folder}/model.keras")
    ...     loaded = keras_bn.load_model(f"{folder}/model.keras")
    >>> type(loaded.get_layer("bn")) is keras_bn.BatchNormalization
    True
    """
    require("keras_bn.load_model", "layers", "graph", "copy")
    path = Path(os.fspath(path))
    with _refusing(path, "it is damaged, or no Keras model"):
        kind = _kind(path)
    custom = dict(kwargs.pop("custom_objects", None) or {})
    with tempfile.TemporaryDirectory() as folder, loading(custom):
        copy = Path(folder) / f"model{kind}"
        exchange = _exchange_in_archive if kind == ".keras" else _exchange_in_hdf5
        with _refusing(path, "it is damaged, or no Keras model"):
            version = exchange(path, copy, custom, kwargs.get("safe_mode", True))
        with _refusing(path, f"Keras {keras.__version__} can't read it", copy):
            model = _loaded(copy, version, custom_objects=custom, **kwargs)
            if kind == ".h5":
                _restore_optimizer(model, path)
        for _, layer in walk(model):
            if type(layer) is SyncBatchNormalization:
                layer.__class__ = BatchNormalization
        # A layer that a user's class makes itself is in no config.
        if _is_keras_in(model):
            model = convert(model)
    _warn_of_lost(model)
    return model


@contextlib.contextmanager
def _refusing(path, reason, copy=None):
    """Turn whatever a broken file leads to into a ValueError of one sentence.

    Args:
        path: the file.
        reason: why it can't be loaded, if the error does not say it in words.
        copy: the file that was read instead, which the user does not know.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:
        message = sentence(error)
        if copy is not None:
            message = message.replace(str(copy), str(path))
        if type(error) is ValueError and str(path) in message:
            raise
        if not _is_prose(error):
            message = f"{reason} ({type(error).__name__}: {message})"
        raise ValueError(f"{path} can't be loaded: {message}") from error


def _is_prose(error):
    """Whether an error was raised with a sentence, by Keras or by a class in a file."""
    if type(error) is TypeError:
        return any(words in str(error) for words in _OF_KERAS)
    return type(error) is ValueError


def _loaded(path, version, **kwargs):
    """The model in a file, without its compilation if Keras 3 can't read Keras 2's."""
    try:
        model = keras.saving.load_model(path, **kwargs)
        # Keras 3.16 takes the name of any loss, and would refuse it in the first step.
        for loss in keras.tree.flatten(getattr(model, "loss", None)):
            keras.losses.get(loss)
        return model
    except Exception as error:
        if version.startswith("3") or not kwargs.get("compile", True):
            raise
        model = keras.saving.load_model(path, **{**kwargs, "compile": False})
        reason = str(error).strip().splitlines()[-1:]
        warnings.warn(
            "Keras 3 can't read the compilation in this file of Keras 2: compile the "
            f"model yourself. ({type(error).__name__}: {' '.join(reason)})",
            stacklevel=3,
        )
        return model


def holds_ours(path):
    """Whether a model file names our layers already."""
    return OURS in _config_of(path)


def layers_of_keras(path):
    """The names of the batch normalizations that are Keras's in a model file; a set."""
    return set(of_keras(json.loads(_config_of(path))))


def _config_of(path):
    """The config of the model in a file, as JSON."""
    path = Path(os.fspath(path))
    if _kind(path) == ".keras":
        with zipfile.ZipFile(path) as archive:
            return archive.read(_CONFIG).decode()
    with h5py.File(path) as file:
        config = file.attrs.get("model_config", "{}")
    return config.decode() if isinstance(config, bytes) else config


def _kind(path):
    """`.keras` or `.h5`, by the file's content; raises for anything else."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file '{path}'.")
    if path.is_dir():
        raise ValueError(
            f"'{path}' is a folder. A SavedModel cannot be converted back into layers; "
            "give the .keras or .h5 file of the model."
        )
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if _CONFIG in archive.namelist():
                return ".keras"
    with path.open("rb") as file:
        if file.read(len(_HDF5)) == _HDF5:
            return ".h5"
    raise ValueError(f"'{path}' is not a Keras model file (.keras or .h5).")


def _restore_optimizer(model, path):
    """Load the state of the optimizer from an HDF5 file.

    Keras 3 builds it for no variables at all, so it could not train.
    """
    if not getattr(model, "compiled", False):
        return
    model.optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    with h5py.File(path) as file:
        group = file.get("optimizer_weights", {})
        stored = [group[name][()] for name in _weight_names(group)] if group else []
    model.optimizer.build(model.trainable_variables)
    variables = model.optimizer.variables
    if [v.shape for v in variables] == [value.shape for value in stored]:
        for variable, value in zip(variables, stored, strict=True):
            variable.assign(value)
    elif stored:
        warnings.warn(
            f"The state of the optimizer in '{path}' does not fit Keras 3's; the "
            "optimizer starts from its initial state.",
            stacklevel=3,
        )


def _weight_names(group):
    """The names of the weights in a group.

    An attribute of HDF5 takes 64 kB; Keras writes what is longer in parts.
    """
    if "weight_names0" not in group.attrs:
        return group.attrs["weight_names"]
    parts = map("weight_names{}".format, itertools.count())
    found = itertools.takewhile(lambda part: part in group.attrs, parts)
    return [name for part in found for name in group.attrs[part]]


def _warn_of_lost(model):
    """Warn of layers with lost moving statistics."""
    named = [
        f"'{path or layer.name}'"
        for path, layer in walk(model)
        if isinstance(layer, BatchNormalization)
        and any(invalid_channel(v.name, v) is not None for v in layer.variables)
    ]
    if named:
        warnings.warn(
            f"The moving statistics of {', '.join(named)} are lost: not finite, or "
            "negative variances. `keras_bn.recalibrate(model, x)` replaces them.",
            stacklevel=3,
        )


def _exchange_in_archive(source, target, custom, safe):
    """Copy a `.keras` archive, naming our layer; returns the version of its Keras.

    The copy has the entries that Keras reads, whoever has packed them, and no others.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            _check_size(source, item)
        names = dict.fromkeys(old.namelist())
        metadata = json.loads(old.read(_METADATA)) if _METADATA in names else {}
        config = _checked(source, json.loads(old.read(_CONFIG)), safe)
        new.writestr(_CONFIG, json.dumps(_converted(modern(config, custom))))
        new.writestr(_METADATA, json.dumps(metadata))
        for name in names:
            if name in _READ[1:] or (name.startswith(_ASSETS) and name[-1] != "/"):
                with (
                    old.open(name) as content,
                    new.open(name, "w", force_zip64=True) as place,
                ):
                    shutil.copyfileobj(content, place)
        version = metadata.get("keras_version") if isinstance(metadata, dict) else None
        return str(version or "3")


@keras.saving.register_keras_serializable(package="keras_bn")
class _Converted(keras.Model):
    """Stands in a config for a model whose normalizations become ours.

    They do so before Keras loads weights and assets: a class that makes its own layers
    makes Keras's, and these would not read the options of ours.
    """

    @classmethod
    def from_config(cls, config, custom_objects=None):
        model = keras.saving.deserialize_keras_object(_with_shapes(config["model"]))
        return convert(model) if _is_keras_in(model) else model


def _converted(config):
    """The config of a model, within that of its conversion."""
    inner = {key: part for key, part in config.items() if key != "compile_config"}
    outer = {
        "module": _Converted.__module__,
        "class_name": _Converted.__name__,
        "registered_name": f"keras_bn>{_Converted.__name__}",
        "config": {"model": inner},
    }
    if "compile_config" in config:
        outer["compile_config"] = config["compile_config"]
    return outer


def _with_shapes(config):
    """A config in which layers are built with tuples, as they were before saving.

    JSON makes lists of them, and `build` of a user's layer may add them to tuples.
    """
    if isinstance(config, list):
        return [_with_shapes(part) for part in config]
    if not isinstance(config, dict):
        return config
    parts = {key: _with_shapes(part) for key, part in config.items()}
    if isinstance(shapes := parts.get("build_config"), dict):
        parts["build_config"] = {key: _shape(part) for key, part in shapes.items()}
    return parts


def _shape(part):
    """A shape, or a structure of shapes, with tuples for lists of sizes."""
    if isinstance(part, dict):
        return {key: _shape(inner) for key, inner in part.items()}
    if isinstance(part, list):
        kind = list if any(isinstance(p, list | dict) for p in part) else tuple
        return kind(map(_shape, part))
    return part


def _is_keras_in(model):
    return any(is_keras(layer) for _, layer in walk(model))


def _check_size(path, item):
    """Refuse an entry that is far larger than what is stored of it."""
    read = item.filename == _CONFIG or item.filename in _READ
    large = item.file_size > (_FLOOR if read else _FLOOR_OF_ASSETS)
    if large and item.file_size > _EXPANSION * item.compress_size:
        raise ValueError(
            f"{path} can't be loaded: its entry {item.filename} would have "
            f"{item.file_size:,} bytes, of which {item.compress_size:,} are stored."
        )


def _checked(path, config, safe):
    """The config of a model; refuses what is none."""
    if not isinstance(config, dict) or not {"class_name", "config"} <= set(config):
        raise ValueError(f"{path} can't be loaded: its config is not that of a model.")
    _check_safe(path, config, safe)
    return config


def _check_safe(path, config, safe):
    """Refuse a config that would run code, as Keras does from 3.11.3 on."""
    if safe and is_code(config):
        raise ValueError(
            f"{path} can't be loaded: it holds a Python lambda, which is code that "
            "would run. If you trust the file, pass `safe_mode=False`."
        )


def _exchange_in_hdf5(source, target, custom, safe):
    """Copy an `.h5` file, naming our layer; returns the version of its Keras."""
    shutil.copyfile(source, target)
    with h5py.File(target, "r+") as file:
        if "model_config" not in file.attrs:
            raise ValueError(
                f"{source} can't be loaded: it holds weights and no model. Load them "
                "into their model: `model.load_weights(path)`."
            )
        config = _checked(source, json.loads(file.attrs["model_config"]), safe)
        file.attrs["model_config"] = json.dumps(modern(config, custom))
        if (training := file.attrs.get("training_config")) is not None:
            training = json.loads(training)
            _check_safe(source, training, safe)
            new = modern_training(training, custom)
            file.attrs["training_config"] = json.dumps(new)
        version = file.attrs.get("keras_version", "1")
    return version.decode() if isinstance(version, bytes) else str(version)
