"""Freezing the statistics of a whole model, and unfreezing them."""

import warnings

import keras

from keras_bn.frozen import forget_traces
from keras_bn.layer import BatchNormalization
from keras_bn.tools import norms
from keras_bn.tools.graph import walk


def freeze(model: keras.Layer, *, affine: bool = False) -> list[str]:
    """Freeze the statistics of every batch normalization of ours in a model.

    From now on training normalizes with the moving statistics and does not change a bit
    of them. Gamma and beta still train, unless `affine` is True. This is independent of
    `trainable`: `base.trainable = True` before fine-tuning does not unfreeze it. Saved
    files and copies keep it.

    It sets `layer.freeze_statistics = True` on every layer, and `layer.freeze_affine =
    True` with `affine`. It takes effect at once in eager loops, and from its next step
    on in every model that holds the layers, also during `fit`. You need not compile
    again. Your own `tf.function` does not change: trace it again.

    Layers of Keras in the model do not change, for they have no such option; a warning
    names them.

    Args:
        model: a model or layer.
        affine: whether to freeze gamma and beta as well.

    Returns:
        The paths of the layers that this call has frozen.

    Raises:
        TypeError: if `model` is not a Keras layer or model.
        ValueError: if the model has no batch normalization of ours.

    Example:

    >>> import keras, keras_bn
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras_bn.BatchNormalization(name="bn")]
    ... )
    >>> keras_bn.freeze(model)
    ['bn']
    >>> keras_bn.freeze(model)
    []
    """
    return _set(model, True, affine)


def unfreeze(model: keras.Layer, *, affine: bool = False) -> list[str]:
    """Let training move the statistics again: the inverse of `freeze`.

    It takes effect as `freeze` does. With `affine`, compile again if the optimizer was
    built while gamma and beta were frozen: it does not know them. A layer with
    `trainable=False` still does not train.

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
    return _set(model, False, affine)


def _set(model, frozen, affine):
    norms.check_layer(model)
    found = {path or layer.name: layer for path, layer in walk(model)}
    layers = {
        path: layer
        for path, layer in found.items()
        if isinstance(layer, BatchNormalization)
    }
    theirs = [path for path, layer in found.items() if norms.is_keras(layer)]
    verb = "freeze" if frozen else "unfreeze"
    if not layers:
        raise ValueError(
            f"'{model.name}' has no batch normalization of keras_bn to {verb}."
            + (" Convert it by `keras_bn.from_keras(model)`." if theirs else "")
        )
    if theirs:
        _warn(
            f"{_listed(theirs)} are layers of Keras, which `{verb}` does not change. "
            "Convert the model first: `keras_bn.from_keras(model)`."
        )
    if unknown := [p for p, each in layers.items() if norms.computes_otherwise(each)]:
        _warn(
            f"{_listed(unknown)} are of subclasses with a `call` of their own. There, "
            f"`{verb}` works only if that `call` uses `freeze_statistics`."
        )
    changed = [
        path
        for path, layer in layers.items()
        if layer.set_frozen(frozen, frozen if affine else None)
    ]
    forget_traces([layers[path] for path in changed])
    return changed


def _listed(paths):
    return ", ".join(f"'{path}'" for path in paths)


def _warn(message):
    warnings.warn(message, stacklevel=4)
