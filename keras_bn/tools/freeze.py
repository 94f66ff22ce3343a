"""Freezing the statistics of a whole model, and unfreezing them."""

import warnings
from typing import Literal, overload

import keras

from keras_bn.layer import BatchNormalization
from keras_bn.surgery import norms
from keras_bn.surgery.classes import warn_of_classes
from keras_bn.surgery.functional import opened
from keras_bn.surgery.private import require
from keras_bn.surgery.view import ModelView
from keras_bn.tools.fold import Fold, FoldPlan
from keras_bn.tools.fuse import separate


@overload
def freeze(
    model: keras.Layer, *, affine: bool = False, fuse: Literal[False] = False
) -> list[str]: ...
@overload
def freeze(
    model: keras.Layer, *, affine: bool = False, fuse: Literal[True]
) -> list[Fold]: ...
@overload
def freeze(
    model: keras.Layer, *, affine: bool = False, fuse: bool = False
) -> list[str] | list[Fold]: ...
def freeze(
    model: keras.Layer, *, affine: bool = False, fuse: bool = False
) -> list[str] | list[Fold]:
    """Freeze the statistics of every `keras_bn.BatchNormalization` in a model.

    From now on training normalizes with the moving statistics and does not change a bit
    of them. Gamma and beta still train, unless `affine` is True. This is independent of
    `trainable`: `base.trainable = True` before fine-tuning does not unfreeze it. Saved
    files and copies keep it.

    It sets `layer.freeze_statistics = True` on every layer, and `layer.freeze_affine =
    True` with `affine`. It takes effect at once in eager loops, and from its next step
    on in every model that holds the layers, also during `fit`. You need not compile
    again. Your own `tf.function` does not change: trace it again.

    Layers of Keras in the model do not change, for they have no such option; a warning
    names them. Another warning names classes that make their own layers: a file of such
    a model loads frozen by `keras_bn.load_model` alone.

    With `fuse`, a frozen normalization and the linear layer before it are computed as
    one in training and in inference: as a linear layer with the kernel `kernel * gamma
    / sqrt(variance + epsilon)`, and with a bias likewise. Between the two may be layers
    that any scale and shift go through, as for `fold`, a `Concatenate` or a sum. A sum
    of parallel branches, as in RepVGG, is computed as one convolution. Kernels and
    biases are computed from the variables in each step, so that kernel, bias, gamma and
    beta get the gradients that they always get, and what you assign to any of them
    counts. Variables, names, checkpoints, the state of the optimizer and files do not
    change. Each layer still gives its own output to whoever asks for that.

    This saves time and memory in what is compiled: `fit`, `evaluate` and `predict`,
    under XLA or not, and your own `tf.function`. Run eagerly, and with PyTorch, the
    layers are computed one after the other, as they are where kernels are large beside
    the output; behind a dropout, they are so in training. It ends for a layer whose
    statistics are no longer frozen. It is not saved: freeze with `fuse` again after
    loading, cloning or pickling a model.

    Args:
        model: a model or layer; with `fuse`, a built one.
        affine: whether to freeze gamma and beta as well.
        fuse: whether to compute them as one with the linear layers before them.

    Returns:
        The paths of the layers that this call has frozen. With `fuse`, a list as
        `plan_fold` gives it: for each layer, the linear layers that take it in, or the
        reason why it is frozen and stays as it is.

    Raises:
        TypeError: if `model` is not a Keras layer or model.
        ValueError: if the model has no `keras_bn.BatchNormalization`; with `fuse`, if
            it is not built.

    Source of the fusion: You et al., "Efficient ConvBN Blocks for Transfer Learning and
    Beyond", 2023 (arXiv 2305.11624).

    Example:

    >>> import keras, keras_bn
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras_bn.BatchNormalization(name="bn")]
    ... )
    >>> keras_bn.freeze(model)
    ['bn']
    >>> keras_bn.freeze(model)
    []
    >>> for fold in keras_bn.freeze(model, fuse=True):
    ...     print(fold)
    bn stays: it takes an input of the model
    """
    require("keras_bn.freeze", "layers", *(("graph", "fuse") if fuse else ()))
    view = ModelView(model)
    layers = check_any(view, "freeze")
    plan = _plan(view) if fuse else None
    before = _frozen(layers)
    for call in plan.fused.values() if plan else ():
        vars(call.layer)["call"] = call
    for layer in layers.values():
        layer.freeze_statistics = True
        if affine:
            layer.freeze_affine = True
        if plan and id(layer) in plan.folded:
            layer.set_fused(True)
    warn_of_skipped(view, layers, "freeze")
    warn_of_classes(view, stacklevel=2)
    return plan.folds if plan else _changed(before, _frozen(layers))


def unfreeze(model: keras.Layer, *, affine: bool = False) -> list[str]:
    """Let training move the statistics again: the inverse of `freeze`.

    It takes effect as `freeze` does. With `affine`, compile again if the optimizer was
    built while gamma and beta were frozen: it does not know them. A layer with
    `trainable=False` still does not train. Layers that were computed as one are so no
    longer.

    Args:
        model: a model or layer.
        affine: whether to unfreeze gamma and beta as well.

    Returns:
        The paths of the layers that this call has unfrozen.

    Raises:
        TypeError, ValueError: as `freeze`.

    Example:

    >>> import keras_bn
    >>> layer = keras_bn.BatchNormalization(freeze_statistics=True)
    >>> len(keras_bn.unfreeze(layer)), layer.freeze_statistics
    (1, False)
    """
    require("keras_bn.unfreeze", "layers")
    view = ModelView(model)
    layers = check_any(view, "unfreeze")
    before = _frozen(layers)
    separate(view)
    for layer in layers.values():
        layer.freeze_statistics = False
        if affine:
            layer.freeze_affine = False
    warn_of_skipped(view, layers, "unfreeze")
    return _changed(before, _frozen(layers))


def _plan(view):
    view.check_built()
    with opened(view) as (graph, closed):
        return FoldPlan(graph, view, closed, fusing=True)


def _frozen(layers):
    """What is frozen in each layer, by path."""
    return {
        path: (
            layer.freeze_statistics,
            layer.freeze_affine,
            [weight.trainable for weight in layer.weights],
        )
        for path, layer in layers.items()
    }


def _changed(before, after):
    return [path for path in before if before[path] != after[path]]


def warn_of_skipped(view, layers, verb, stacklevel=2):
    """Warn of layers that a tool for `keras_bn` layers does not change.

    Args:
        view: the `ModelView` of the model.
        layers: the `keras_bn` layers in it, by path.
        verb: what was done to them.
        stacklevel: as of `warnings.warn`, for the caller of this function.
    """
    if theirs := _theirs(view):
        _warn(
            f"{_listed(theirs)} are layers of Keras, which `{verb}` does not change. "
            "Convert the model first: `keras_bn.from_keras(model)`.",
            stacklevel,
        )
    if unknown := [p for p, la in layers.items() if norms.computes_otherwise(la)]:
        _warn(
            f"{_listed(unknown)} are of subclasses with a `call` of their own. There, "
            f"`{verb}` works only if that `call` uses the options of the layer.",
            stacklevel,
        )


def check_any(view, verb):
    """The `keras_bn` layers in a model, by path; refuses a model that has none."""
    if layers := view.of_type(BatchNormalization):
        return layers
    raise ValueError(
        f"'{view.model.name}' has no batch normalization of keras_bn to {verb}."
        + (" Convert it by `keras_bn.from_keras(model)`." if _theirs(view) else "")
    )


def _theirs(view):
    return [path for path, layer in view.layers if norms.is_keras(layer)]


def _listed(paths):
    return ", ".join(f"'{path}'" for path in paths)


def _warn(message, stacklevel):
    warnings.warn(message, stacklevel=stacklevel + 2)
