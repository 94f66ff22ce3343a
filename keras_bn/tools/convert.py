"""Replacing Keras's batch normalization by ours in a model, and back."""

import inspect
import warnings
from typing import TypeVar

import keras

from keras_bn.layer import BatchNormalization
from keras_bn.layer.arguments import AFFINE, BEYOND_KERAS
from keras_bn.surgery.classes import warn_of_classes
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.exchange import (
    exchange,
    exchange_alive,
    optimizers,
    rekey,
    replace,
)
from keras_bn.surgery.graph import scope
from keras_bn.surgery.norms import (
    MadeByTool,
    computes_otherwise,
    is_frozen,
    is_keras,
    is_ours,
)
from keras_bn.surgery.private import require
from keras_bn.surgery.rebuild import rebuild
from keras_bn.surgery.view import ModelView
from keras_bn.tools.fuse import separate

# A copy of a model is of the class of the model.
ModelT = TypeVar("ModelT", bound=keras.Layer)
# Options that no layer of Keras's has. Frozen ones it may express by `trainable`.
_BEYOND_KERAS = {
    name: unused
    for name, unused in BEYOND_KERAS.items()
    if not name.startswith("freeze")
}
# Older releases of Keras have no renorm.
_TAKEN_BY_KERAS = inspect.signature(keras.layers.BatchNormalization).parameters
if "renorm" not in _TAKEN_BY_KERAS:
    _BEYOND_KERAS["renorm"] = False


def from_keras(
    model: ModelT, *, in_place: bool = False, compiled: bool = True
) -> ModelT:
    """A copy of a model with `keras_bn` layers in the place of Keras's.

    The copy has the same names, weights, trainable flags, dtype policies,
    regularizers, shared layers and random state. It shares no variable with the
    original, which does not change. If the model was compiled, so is the copy, with
    the state of its optimizer: training continues where it was.

    This converts models of every kind, to any depth: Functional, Sequential,
    subclassed, layers inside wrappers such as `TimeDistributed`. It copies the objects
    themselves, not their configs: your own functions and classes need neither
    `get_config` nor registration. The copy shares objects with the original that hold
    nothing of Keras's, such as a tokenizer.

    Args:
        model: a model, or a single layer.
        in_place: whether to replace the layers of the given model itself, instead of
            those of a copy. Nothing else in it changes: the new layers take over the
            variables of the old ones, so optimizers and traced functions still work.
        compiled: whether a copy is compiled if the model is.

    Returns:
        The converted copy; with `in_place`, the given model.

    Raises:
        TypeError: if `model` is not a Keras layer or model.
        ValueError: for a subclass of Keras's BatchNormalization with its own `call`;
            the message gives its path, and nothing changes.

    Warns:
        UserWarning: for a model whose class makes its own layers and has none of them
            in its config: `keras_bn.load_model` alone loads a file of it with
            `keras_bn` layers.

    Example:

    >>> import keras
    >>> import keras_bn
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.BatchNormalization(name="bn")]
    ... )
    >>> converted = keras_bn.from_keras(model)
    >>> type(converted.get_layer("bn")) is keras_bn.BatchNormalization
    True
    """
    require("keras_bn.from_keras", "layers", "graph", "copy")
    new = convert(model, in_place, compiled)
    warn_of_classes(ModelView(new), stacklevel=2)
    return new


def convert(model, in_place=False, compiled=True):
    """As `from_keras`, without a warning of what saving the result would lose."""
    return _convert(model, is_keras, BatchNormalization, in_place, compiled)


def to_keras(model: ModelT, *, in_place: bool = False, compiled: bool = True) -> ModelT:
    """A copy of a model with Keras's layers in the place of those of `keras_bn`.

    The inverse of `from_keras`, with the same guarantees, for layers whose options
    Keras has. Frozen statistics become Keras's `trainable=False`: such a layer gives
    the same outputs in training and inference, but its gamma and beta do not train.
    Layers that `freeze(model, fuse=True)` has fused are computed one by one again.

    Args:
        model: a model, or a single layer.
        in_place, compiled: as in `from_keras`.

    Returns:
        The converted copy; with `in_place`, the given model.

    Raises:
        TypeError: if `model` is not a Keras layer or model.
        ValueError: for a layer with an option that Keras does not have, naming both;
            for a subclass of the layer with its own `call`; and for a model from
            `keras_bn.quantize_aware`, whose layers Keras does not have.

    Warns:
        UserWarning: if gamma and beta trained beside frozen statistics, with the paths
            of these layers.

    Example:

    >>> import keras_bn
    >>> layer = keras_bn.BatchNormalization(momentum=0.9, name="bn")
    >>> keras_bn.to_keras(layer).momentum
    0.9
    >>> keras_bn.to_keras(keras_bn.BatchNormalization(axis=[1, 2], name="bn"))
    Traceback (most recent call last):
    ...
    ValueError: Keras's BatchNormalization has no equivalent of axis=[1, 2] in 'bn'.
    """
    require("keras_bn.to_keras", "layers", "graph", "copy")
    kind = keras.layers.BatchNormalization
    return _convert(model, is_ours, kind, in_place, compiled)


def _convert(model, wanted, kind, in_place, compiled):
    """Replace the wanted layers of a model, or of a copy of it."""
    view = ModelView(model)
    if in_place and not compiled:
        raise ValueError(
            "`compiled=False` goes with a copy. Received: in_place=True, compiled=False"
        )
    for path, layer in view.layers:
        _check(layer, path, wanted, kind)
    if wanted(model) and in_place:
        raise ValueError(
            f"'{model.name}' is a normalization itself: an object cannot change its "
            "class. Convert it without `in_place`; this gives a new layer."
        )
    losing = [] if kind is BatchNormalization else _losing_affine(view)
    if wanted(model):
        new = _replacement(copy_model(model, view=view)[0], kind)
        _warn_of_affine(losing)
        return new
    if not in_place:
        model, _ = copy_model(model, compiled, view)
        view = ModelView(model)
    layers = [layer for _, layer in view.layers if wanted(layer)]
    with scope(model):
        pairs = [(layer, _replacement(layer, kind)) for layer in layers]
    if kind is not BatchNormalization:
        separate(view)  # layers of Keras apply no deferred affine
    if in_place:
        exchange_alive(pairs)
    else:
        exchange(pairs, view.holders)
    _hand_over_variables(model, pairs)
    _warn_of_affine(losing)
    return model


def _replacement(layer, kind):
    """The layer that takes the place of another; Keras freezes by `trainable`."""
    new = rebuild(layer, kind)
    if kind is not BatchNormalization and is_frozen(layer):
        new.trainable = False
    return new


def _hand_over_variables(model, pairs):
    """Tell optimizers about the variables that had to be made again."""
    instead: dict = {}
    for old, new in pairs:
        by_name = {variable.name: variable for variable in new.variables}
        instead |= {
            id(v): (v, by_name[v.name])
            for v in old.variables
            if v.name in by_name and by_name[v.name] is not v
        }
    if not instead:
        return
    for optimizer in optimizers(model):
        replace(optimizer, {key: new for key, (_, new) in instead.items()})
        rekey(optimizer, instead.values())


def _losing_affine(view):
    """The layers whose parameters train now, and will not in a layer of Keras's."""
    return [
        f"'{path}'"
        for path, layer in view.layers
        if is_ours(layer) and layer.trainable and layer.freeze_statistics
        if any(
            present and layer.freeze_affine not in (True, name)
            for name, present in zip(AFFINE, (layer.scale, layer.center), strict=True)
        )
    ]


def _warn_of_affine(paths):
    if paths:
        warnings.warn(
            "Keras freezes statistics by `trainable=False`, and gamma and beta with "
            f"them: they no longer train in {', '.join(paths)}.",
            stacklevel=4,
        )


def _check(layer, path, wanted, kind):
    """Refuse a layer that no layer of the wanted class can replace."""
    theirs = kind is BatchNormalization
    if not theirs and isinstance(layer, MadeByTool):
        raise ValueError(
            f"'{path}' was made by `{layer.made_by}`; Keras has no such layer. Write "
            "the model by `keras_bn.export_int8`, or convert the one that you gave to "
            f"`{layer.made_by}`."
        )
    base = keras.layers.BatchNormalization if theirs else BatchNormalization
    if isinstance(layer, base) and computes_otherwise(layer):
        raise ValueError(
            f"Cannot convert '{path}': {type(layer).__name__} derives from "
            f"{base.__name__} and computes something of its own, which the new layer "
            "would not. Use a plain BatchNormalization, and put what the subclass adds "
            "into a separate layer."
        )
    if not theirs and wanted(layer):
        _check_expressible(layer, path)


def _check_expressible(layer, path):
    refused = [
        f"{name}={getattr(layer, name)!r}"
        for name, default in _BEYOND_KERAS.items()
        if getattr(layer, name) != default
    ]
    if layer.freeze_affine and not is_frozen(layer):
        refused.append(f"freeze_affine={layer.freeze_affine!r}")
    if isinstance(layer.axis, list):
        refused.append(f"axis={layer.axis}")
    if layer.momentum is None or callable(layer.momentum):
        refused.append(f"momentum={layer.momentum!r}")
    for name, bound in (layer.renorm_clipping or {}).items():
        if not isinstance(bound, int | float | None):
            refused.append(f"renorm_clipping[{name!r}]={bound!r}")
    if refused:
        raise ValueError(
            f"Keras's BatchNormalization has no equivalent of {', '.join(refused)} "
            f"in '{path}'."
        )
