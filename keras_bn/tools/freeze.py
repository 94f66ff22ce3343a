"""Holding the statistics of a whole model still, and letting them go again."""

import keras

from keras_bn.tools.convert import is_keras, is_ours
from keras_bn.tools.exchange import forget_traces
from keras_bn.tools.graph import walk


def freeze(model, *, affine=False):
    """Freeze the statistics of every batch normalization of ours in a model.

    From now on training normalizes with the moving statistics and leaves them alone,
    to the bit. Gamma and beta go on training, unless `affine` says otherwise. It is
    independent of `trainable`: a base that is thawed for fine-tuning with
    `base.trainable = True` keeps its statistics.

    It takes effect at once in eager loops, and in the next `fit` or `train_on_batch`
    of the given model, with no need to compile again. What else has been compiled
    before, such as a `tf.function` of your own or a model that holds this one, goes
    on as it was traced: give `freeze` the model that you train, or compile again.

    Args:
        model: a model or layer.
        affine: whether to freeze gamma and beta as well.

    Returns:
        The paths of the layers that were not frozen before and are now.

    Raises:
        TypeError: for what is no Keras layer or model.
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


def unfreeze(model, *, affine=False):
    """Let training move the statistics again: the inverse of `freeze`.

    It takes effect as `freeze` does. With `affine`, compile again if the optimizer was
    built while gamma and beta were frozen: it does not know them.

    Args:
        model: a model or layer.
        affine: whether to thaw gamma and beta as well.

    Returns:
        The paths of the layers that were frozen before and are not now.

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
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"Expected a Keras layer or model. Received: {model!r}")
    layers = {
        path or layer.name: layer for path, layer in walk(model) if is_ours(layer)
    }
    if not layers:
        theirs = any(is_keras(layer) for _, layer in walk(model))
        raise ValueError(
            f"'{model.name}' has no batch normalization of keras_bn to freeze."
            + (" Convert it by `keras_bn.from_keras(model)`." if theirs else "")
        )
    changed = []
    for path, layer in layers.items():
        parameters = [w for w in (layer.gamma, layer.beta) if w is not None]
        parameters = parameters if affine else []
        if layer.freeze_statistics is frozen and all(
            w.trainable is not frozen for w in parameters
        ):
            continue
        layer.freeze_statistics = frozen
        for parameter in parameters:
            parameter.trainable = not frozen
        changed.append(path)
    if changed:
        forget_traces(layers[path] for path in changed)
    return changed
