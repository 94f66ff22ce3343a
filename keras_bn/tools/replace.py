"""Other layers in the place of batch normalizations: the way out."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import keras

from keras_bn.layer.arguments import AFFINE
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.exchange import exchange
from keras_bn.surgery.functional import opened
from keras_bn.surgery.graph import scope_of_copies
from keras_bn.surgery.norms import MadeByTool, is_normalization, warn_of_others
from keras_bn.surgery.private import require
from keras_bn.surgery.view import ModelView
from keras_bn.tools.fuse import separate

ModelT = TypeVar("ModelT", bound=keras.Layer)

# The default of `GroupNormalization`, and of Wu and He (2018).
_GROUPS = 32


def replace(
    model: ModelT,
    by: Literal["group"] | Callable[[Any], keras.Layer | None] = "group",
) -> ModelT:
    """A copy of a model with another layer in the place of each batch normalization.

    The new layers take over gamma and beta where they have variables of these names and
    shapes. Everything else is as before, but a network has adapted to the layers that
    it was trained with: **train the copy** before you rely on it.

    With `"group"`, no sample depends on the others of its batch any more, so the
    network trains with any batch size.

    Args:
        model: a built model or layer, which does not change.
        by: `"group"` for `keras.layers.GroupNormalization`, with the largest number of
            groups up to 32 that divides the channels. Where a sample has one element
            per channel, as behind `Dense`, it is one group: a group of one element
            would always be 0. Or a function from a normalization, `keras_bn` or Keras,
            to the layer for its place; None leaves the normalization.

    Returns:
        The copy, which is not compiled. A subclassed model stays one of its class, but
        where its code passes an argument such as `mask=None`, which the new layer does
        not take: then it is the Functional model of `keras_bn.functional`.

    Raises:
        TypeError: if `model` is not a Keras layer or model, or `by` gives anything but
            a layer.
        ValueError: for a model that is not built or has no batch normalization, for
            one from `keras_bn.quantize_aware`, for statistics over several axes with
            `"group"`, and for a call with arguments that the new layer does not take,
            such as a mask, also in the code of a class that can be opened.

    Source: Wu and He, "Group Normalization", 2018.

    Example:

    >>> import keras, keras_bn
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 3)),
    ...     keras.layers.Conv2D(48, 3),
    ...     keras_bn.BatchNormalization(name="norm"),
    ... ])
    >>> keras_bn.replace(model, "group").get_layer("norm").groups
    24
    >>> by = lambda norm: keras.layers.LayerNormalization(name=norm.name)
    >>> type(keras_bn.replace(model, by).get_layer("norm")).__name__
    'LayerNormalization'
    """
    require("keras_bn.replace", "layers", "graph", "copy")
    if by != "group" and not callable(by):
        raise ValueError(
            f"`by` must be 'group' or a function from a normalization to a layer. "
            f"Received: by={by!r}"
        )
    make = _group if by == "group" else by
    view = ModelView(model)
    view.check_built()
    norms = [(path, layer) for path, layer in view.layers if is_normalization(layer)]
    if not norms:
        raise ValueError(f"'{model.name}' has no batch normalization to replace.")
    for path, layer in view.layers:
        if isinstance(layer, MadeByTool) and layer.folded_normalization is not None:
            raise ValueError(
                f"'{path}' was made by `{layer.made_by}` and computes with its "
                "normalization. Replace the layers of the model that it was made from."
            )
    with scope_of_copies(model):
        made = [(norm, path, _made(make, norm, path)) for path, norm in norms]
    _check_all_different(made)
    made = [(norm, path, layer) for norm, path, layer in made if layer is not None]
    if norms[0][1] is model:
        return made[0][2] if made else copy_model(model, compiled=False, view=view)[0]
    with opened(view) as (graph, closed):
        _check_calls(graph, {id(norm): layer for norm, _, layer in made})
    copy = _replaced(view, made)
    if graph is not view:
        with opened(ModelView(copy)) as (_, closed_now):
            fails = len(closed_now) > len(closed)
        if fails:  # its own code calls the new layers with what they do not take
            with opened(view) as (graph, _):
                copy = _replaced(graph, made)
    warn_of_others(model)
    return copy


def _replaced(view, made):
    """A copy of the model of a view, with other layers in it.

    Args:
        view: a `ModelView`.
        made: a list of a normalization, its path, and the layer for its place.
    """
    copy, of = copy_model(view.model, compiled=False, view=view)
    pairs = [(of(norm), layer) for norm, _, layer in made]
    for (old, new), (_, path, _) in zip(pairs, made, strict=True):
        if new.name == path.rpartition("/")[2]:
            new.name = old.name  # in a graph, no two may have the same
    view = ModelView(copy)
    separate(view)  # the new layers follow no deferred affine maps
    exchange(pairs, view.holders)
    for layer, arguments in _calls(view, {id(new): new for _, new in pairs}):
        for name in _unknown(layer, arguments):  # each None, as was checked
            del arguments[name]
    return copy


def _made(make, norm, path):
    """The new layer for a normalization, built, with its gamma and beta."""
    layer = make(norm)
    if layer is None:
        return None
    if not isinstance(layer, keras.Layer):
        raise TypeError(
            f"`by` must give a layer, or None to leave '{path}'. Received: {layer!r}"
        )
    if layer is norm:
        return None
    if not layer.built:
        layer.build_from_config(norm.get_build_config())
    for name in AFFINE:
        old, new = getattr(norm, name, None), getattr(layer, name, None)
        if old is not None and new is not None and new.shape == old.shape:
            new.assign(old)
    layer.trainable = norm.trainable
    return layer


def _group(norm):
    """The `GroupNormalization` for the place of a normalization."""
    shape = norm.get_build_config()["input_shape"]
    if not isinstance(norm.axis, int):
        raise ValueError(
            f"`GroupNormalization` has groups along one axis, and '{norm.name}' has "
            f"statistics over several. Received: axis={list(norm.axis)}"
        )
    axis = norm.axis % len(shape)
    channels = shape[axis]
    alone = all(size == 1 for i, size in enumerate(shape) if i not in (0, axis))
    limit = 1 if alone else min(_GROUPS, channels)
    return keras.layers.GroupNormalization(
        groups=max(n for n in range(1, limit + 1) if channels % n == 0),
        axis=axis,
        epsilon=norm.epsilon,
        center=norm.center,
        scale=norm.scale,
        **{
            f"{name}_{kind}": getattr(norm, f"{name}_{kind}")
            for name in AFFINE
            for kind in ("initializer", "regularizer", "constraint")
        },
        name=norm.name,
        dtype=norm.dtype_policy,
    )


def _check_all_different(made):
    """Refuse one layer for two places, which would share its variables."""
    first: dict[int, tuple] = {}
    for norm, path, layer in made:
        before, other = first.setdefault(id(layer), (norm, path))
        if layer is not None and before is not norm:
            raise ValueError(
                f"`by` must give each normalization a layer of its own. Received: "
                f"'{layer.name}' for '{other}' and for '{path}'"
            )


def _check_calls(view, new_layers):
    """Refuse a call with an argument that the layer in its place does not take."""
    for layer, arguments in _calls(view, new_layers):
        if names := [k for k in _unknown(layer, arguments) if arguments[k] is not None]:
            raise ValueError(
                f"'{layer.name}' would be called with `{names[0]}`, which "
                f"{type(layer).__name__} does not take."
            )


def _calls(view, new_layers):
    """Each call of a replaced layer: the new layer, and the keyword arguments."""
    for node in view.calls:
        layer = new_layers.get(id(node.operation))
        if layer is not None:
            yield layer, node.arguments.kwargs


def _unknown(layer, arguments):
    """The names of the arguments that a layer does not take."""
    parameters = inspect.signature(layer.call).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    # Keras itself leaves out `training` where a layer does not take it.
    return [name for name in arguments if name not in (*parameters, "training")]
