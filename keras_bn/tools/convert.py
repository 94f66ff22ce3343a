"""Exchanging Keras's batch normalization for ours in a model, and back."""

import inspect

import keras

from keras_bn.layer import BatchNormalization
from keras_bn.tools.graph import Copier, copy_variables, is_graph, walk

# What a layer of ours may be set to that Keras's has no argument for, and the value
# that says the same as not having it.
_BEYOND_KERAS = {
    "virtual_batch_size": None,
    "unbiased": False,
    "debias": False,
    "freeze_statistics": False,
    "freeze_affine": False,
}
# Older releases of Keras have no renorm.
_TAKEN_BY_KERAS = inspect.signature(keras.layers.BatchNormalization).parameters
if "renorm" not in _TAKEN_BY_KERAS:
    _BEYOND_KERAS["renorm"] = False


def from_keras(model, *, in_place=False):
    """A copy of a model in which every Keras BatchNormalization is one of ours.

    The copy has the same names, weights, trainable flags, dtype policies,
    regularizers, shared layers and random state, and no variable in common with the
    original, which is left as it is. If the model was compiled, so is the copy, with
    the state its optimizer has reached: training goes on as if nothing had happened.

    Functional and Sequential models are converted to any depth, layers inside
    wrappers such as `TimeDistributed` and `Bidirectional` included. A subclassed
    model or layer is made from its config, and its sublayers are exchanged; where its
    class has no `get_config`, use `in_place`. Subclasses of Keras's
    BatchNormalization may do something else, and stay.

    Args:
        model: a model, or a single layer.
        in_place: whether to exchange the sublayers of the given subclassed model or
            layer itself, instead of those of a copy. Nothing else in it changes.

    Returns:
        The converted copy; with `in_place`, the given model.

    Raises:
        TypeError: for what is no Keras layer or model.
        ValueError: for layers that cannot be copied, with what to do about it.

    Example:

    >>> import keras
    >>> import keras_bn
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.BatchNormalization(name="bn")]
    ... )
    >>> converted = keras_bn.from_keras(model)
    >>> type(converted.get_layer("bn")).__module__
    'keras_bn.layer'
    """
    return _convert(model, is_keras, _from_keras, in_place)


def to_keras(model, *, in_place=False):
    """A copy of a model in which every layer of ours is Keras's BatchNormalization.

    The inverse of `from_keras`, with the same promises, for layers whose options
    Keras can express.

    Args:
        model: a model, or a single layer.
        in_place: as in `from_keras`.

    Returns:
        The converted copy; with `in_place`, the given model.

    Raises:
        TypeError: for what is no Keras layer or model.
        ValueError: for a layer with an option that Keras has no equivalent of, naming
            both; and for layers that cannot be copied.

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
    if isinstance(model, keras.layers.Layer):
        for path, layer in walk(model):
            if is_ours(layer):
                _check_expressible(layer, path)
    return _convert(model, is_ours, _to_keras, in_place)


def is_keras(layer):
    """Whether a layer is Keras's own BatchNormalization, no subclass of it."""
    return type(layer) is keras.layers.BatchNormalization


def is_ours(layer):
    """Whether a layer is ours, or a subclass of it."""
    return isinstance(layer, BatchNormalization)


def _convert(model, wants, make, in_place):
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"Expected a Keras layer or model. Received: {model!r}")
    copier = Copier(wants, make, fill=copy_variables)
    if not in_place:
        return copier.copy(model)
    if is_graph(model) or wants(model):
        raise ValueError(
            "`in_place=True` is for subclassed models and layers, whose sublayers are "
            f"attributes. '{model.name}' is a {type(model).__name__}: convert it "
            "without, which gives a new one."
        )
    copier.exchange(model)
    return model


def _from_keras(layer):
    return BatchNormalization.from_config(layer.get_config())


def _to_keras(layer):
    config = layer.get_config()
    for name in (*_BEYOND_KERAS, "renorm_clipping", "renorm_momentum"):
        if name not in _TAKEN_BY_KERAS:
            config.pop(name, None)
    return keras.layers.BatchNormalization.from_config(config)


def _check_expressible(layer, path):
    refused = [
        f"{name}={getattr(layer, name)!r}"
        for name, default in _BEYOND_KERAS.items()
        if getattr(layer, name) != default
    ]
    if isinstance(layer.axis, list):
        refused.append(f"axis={layer.axis}")
    if layer.momentum is None:
        refused.append("momentum=None")
    for name, bound in (layer.renorm_clipping or {}).items():
        if not isinstance(bound, int | float | None):
            refused.append(f"renorm_clipping[{name!r}]={bound!r}")
    if refused:
        raise ValueError(
            f"Keras's BatchNormalization has no equivalent of {', '.join(refused)} "
            f"in '{path or layer.name}'."
        )
