"""Loading a saved Keras model straight into our layers."""

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
from keras_bn.layer.stored import lenient, lost
from keras_bn.loading.compilation import modern_training
from keras_bn.loading.configs import OURS, SyncBatchNormalization, modern
from keras_bn.surgery.graph import walk
from keras_bn.surgery.norms import is_keras
from keras_bn.surgery.private import require
from keras_bn.tools.convert import from_keras

_HDF5 = b"\x89HDF\r\n\x1a\n"


def load_model(path: str | os.PathLike[str], **kwargs: Any) -> keras.Model:
    """Load a model that Keras 3 or Keras 2 saved, with our layers in it.

    Like `keras.saving.load_model`, with every BatchNormalization replaced by ours. It
    also loads files that Keras 3 cannot: those of Keras 2 say `axis: [3]`, and those of
    a model compiled on PyTorch name an optimizer that only trains there. Keras's safe
    mode is on by default: it refuses a file that would run code of its own.

    If moving statistics are lost (NaN, infinite, a negative variance), it warns and
    names the layers; `keras_bn.recalibrate` fixes the model.
    `keras.saving.load_model` refuses such a file with our layers.

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
    kind = _kind(path)
    custom = dict(kwargs.pop("custom_objects", None) or {})
    with tempfile.TemporaryDirectory() as folder, lenient():
        copy = Path(folder) / f"model{kind}"
        exchange = _exchange_in_archive if kind == ".keras" else _exchange_in_hdf5
        version = exchange(path, copy, custom)
        model = _loaded(copy, version, custom_objects=custom, **kwargs)
        if kind == ".h5":
            _restore_optimizer(model, path)
        for _, layer in walk(model):
            if type(layer) is SyncBatchNormalization:
                layer.__class__ = BatchNormalization
        # A layer that a user's class makes itself is in no config.
        if any(is_keras(layer) for _, layer in walk(model)):
            model = from_keras(model)
    _warn_of_lost(model)
    return model


def _loaded(path, version, **kwargs):
    """The model in a file, without its compilation if Keras 3 can't read Keras 2's."""
    try:
        return keras.saving.load_model(path, **kwargs)
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
    path = Path(os.fspath(path))
    if _kind(path) == ".keras":
        with zipfile.ZipFile(path) as archive:
            return OURS.encode() in archive.read("config.json")
    with h5py.File(path) as file:
        config = file.attrs.get("model_config", "")
    return OURS in (config.decode() if isinstance(config, bytes) else config)


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
            if "config.json" in archive.namelist():
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
        names = group.attrs["weight_names"] if group else []
        stored = [group[name][()] for name in names]
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


def _warn_of_lost(model):
    """Warn of layers with lost moving statistics."""
    named = [
        f"'{path or layer.name}'"
        for path, layer in walk(model)
        if isinstance(layer, BatchNormalization)
        and any(lost(v.name, v) is not None for v in layer.variables)
    ]
    if named:
        warnings.warn(
            f"The moving statistics of {', '.join(named)} are lost: not finite, or "
            "negative variances. `keras_bn.recalibrate(model, x)` replaces them.",
            stacklevel=3,
        )


def _exchange_in_archive(source, target, custom):
    """Copy a `.keras` archive, naming our layer; returns the version of its Keras."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            if item.filename == "config.json":
                config = json.loads(old.read(item))
                new.writestr(item, json.dumps(modern(config, custom)))
                continue
            with old.open(item) as content, new.open(item, "w") as place:
                shutil.copyfileobj(content, place)
        named = "metadata.json" in old.namelist()
        return json.loads(old.read("metadata.json"))["keras_version"] if named else "3"


def _exchange_in_hdf5(source, target, custom):
    """Copy an `.h5` file, naming our layer; returns the version of its Keras."""
    shutil.copyfile(source, target)
    with h5py.File(target, "r+") as file:
        for name, made in (
            ("model_config", modern),
            ("training_config", modern_training),
        ):
            config = file.attrs.get(name)
            if config is not None:
                file.attrs[name] = json.dumps(made(json.loads(config), custom))
        version = file.attrs.get("keras_version", "1")
    return version.decode() if isinstance(version, bytes) else version
