"""Whether a layer is a batch normalization: ours or Keras's, frozen, built.

All tools ask here. A subclass of Keras's layer or of ours counts if it computes what
its base class does: it may have its own arguments or defaults, but not its own `call`.
"""

import warnings
from typing import Any, Protocol, runtime_checkable

import keras

from keras_bn.layer import BatchNormalization
from keras_bn.surgery.graph import walk
from keras_bn.surgery.private import attributes

# The methods of Keras's layer and of ours that compute the result.
_COMPUTING = (
    "__call__",
    "call",
    "normalize_batch",
    *attributes("BatchNormalization"),
)

# May be installed beside Keras 3. TensorFlow still contains an older Keras.
_OLDER_KERASES = ("tf_keras", "tensorflow.python.keras", "keras_core")


def is_ours(layer) -> bool:
    """Whether a layer is our batch normalization, or a subclass computing it."""
    return isinstance(layer, BatchNormalization) and not _overrides(
        layer, BatchNormalization
    )


def is_keras(layer) -> bool:
    """Whether a layer is Keras's batch normalization, or a subclass computing it."""
    base = keras.layers.BatchNormalization
    return isinstance(layer, base) and not _overrides(layer, base)


def is_normalization(layer) -> bool:
    """Whether a layer is a batch normalization, ours or Keras's."""
    return is_ours(layer) or is_keras(layer)


def computes_otherwise(layer) -> bool:
    """Whether a layer derives from a batch normalization, but has its own `call`.

    No tool can know what it computes: conversion refuses it, the others leave it as it
    is and say so.
    """
    bases = BatchNormalization, keras.layers.BatchNormalization
    return isinstance(layer, bases) and not is_normalization(layer)


def plain(layer):
    """The class of a normalization, ours or Keras's, without any subclass."""
    return BatchNormalization if is_ours(layer) else keras.layers.BatchNormalization


def is_frozen(layer) -> bool:
    """Whether training does not change the statistics of a layer, ours or Keras's."""
    return not layer.trainable or getattr(layer, "freeze_statistics", False)


def adapts(layer) -> bool:
    """Whether inference of a layer follows its inputs: see `keras_bn.adapt`."""
    return isinstance(layer, BatchNormalization) and layer.adapts


@runtime_checkable
class MadeByTool(Protocol):
    """A layer that a tool puts into a model, and that exists in this package alone.

    Attributes:
        made_by: the public name of the tool.
        folded_normalization: the normalization that it computes with and does not call
            in inference, which has to stay ours; or None.
    """

    made_by: str

    @property
    def folded_normalization(self) -> Any: ...


def normalizations(model) -> dict:
    """The batch normalizations of a built model, by path; a layer alone by its name.

    Raises:
        TypeError: if `model` is not a Keras layer or model.
        ValueError: if the model, or a normalization in it, is not built.
    """
    check_layer(model)
    layers = [(path or layer.name, layer) for path, layer in walk(model)]
    check_built(model, layers)
    return {path: layer for path, layer in layers if is_normalization(layer)}


def warn_of_others(model, stacklevel=3):
    """Warn of layers that a tool skips, since they compute something else."""
    others = [path or la.name for path, la in walk(model) if computes_otherwise(la)]
    if others:
        warnings.warn(
            f"Skipped, since the class has a `call` of its own: {', '.join(others)}",
            stacklevel=stacklevel,
        )


def check_layer(model):
    """Refuse what is not a layer or model of Keras 3; for older ones, say what to do.

    Raises:
        TypeError: if `model` is not a Keras layer or model.
    """
    if isinstance(model, keras.layers.Layer):
        return
    hint = ""
    if package := _older_keras(model):
        hint = (
            f", which is of {package} and not of Keras 3. Save the model to a file, "
            '`model.save("model.h5")`, and load that: '
            '`keras_bn.load_model("model.h5")`'
        )
    raise TypeError(f"Expected a Keras layer or model. Received: {model!r}{hint}.")


def check_built(model, layers):
    """Refuse what has no statistics yet.

    Args:
        model: a Keras layer or model.
        layers: all of its layers, pairs of a path and a layer.

    Raises:
        ValueError: if the model, or a normalization in it, is not built.
    """
    if not model.built:
        raise ValueError(
            f"'{model.name}' is not built, so it has no statistics yet. Call it on "
            "data, or build it, first."
        )
    for path, layer in layers:
        if is_normalization(layer) and not layer.built:
            raise ValueError(
                f"'{path}' is not built, so it has no statistics yet: "
                "the model has never called it. Call the model on data that reaches "
                "it, or take it out."
            )


def _older_keras(model):
    """The package of another Keras that a model or layer comes from, or None."""
    modules = [f"{kind.__module__}." for kind in type(model).__mro__]
    for package in _OLDER_KERASES:
        if any(module.startswith(f"{package}.") for module in modules):
            return package
    return None


def _overrides(layer, base) -> bool:
    """Whether the class of a layer replaces a computing method of `base`."""
    kind = type(layer)
    return any(
        getattr(kind, name, None) is not getattr(base, name, None)
        for name in _COMPUTING
    )
