"""Models whose inference follows the inputs that they meet."""

import warnings

import keras

from keras_bn.layer import BatchNormalization
from keras_bn.layer.arguments import check_memory, check_prior
from keras_bn.surgery.classes import made_by_classes
from keras_bn.surgery.exchange import exchange_alive
from keras_bn.surgery.graph import scope
from keras_bn.surgery.private import require
from keras_bn.surgery.rebuild import rebuild
from keras_bn.surgery.view import ModelView
from keras_bn.tools.freeze import check_any, warn_of_skipped

_RUNNING = {"adapted_mean": "moving_mean", "adapted_variance": "moving_variance"}


def adapt(
    model: keras.Layer, *, prior: float | None = None, memory: float | None = None
) -> list[str]:
    """Let inference follow the inputs, where they differ from the training data.

    From now on, inference normalizes with the moving statistics, counted as `prior`
    samples, pooled with the statistics of the present batch. Training, gamma and beta,
    and the moving statistics do not change. It is saved with the model, takes effect
    in the next step of every model that holds the layers, and needs no compilation.

    A prediction then depends on the other samples of its batch: give batches that are
    mixed as the inputs are. In a batch of one class, the statistics are those of that
    class, and predictions get worse.

    Args:
        model: a built model or layer with `keras_bn.BatchNormalization` layers.
        prior: for how many samples the moving statistics count, 0 or greater; 16 by
            default. With 0, the batch alone counts.
        memory: instead of `prior`: keep a running average over batches, in which the
            old value has this weight, a float in [0, 1]. It starts from the moving
            statistics, and again when they are set. It takes two more weights, so the
            layers are made anew: get them from the model again.

    Returns:
        The paths of the layers.

    Raises:
        TypeError: if `model` is not a Keras layer or model.
        ValueError: for a `prior` or `memory` out of range, or both; and if the model
            has no `keras_bn.BatchNormalization`, or is one itself and has to be made
            anew.

    Warns:
        UserWarning: for a `memory` in a model whose class makes its own layers: a file
            of it would not load.

    Source: Schneider et al., "Improving robustness against common corruptions by
    covariate shift adaptation", 2020 (arXiv 2006.16971). They average means and
    variances; this pools samples, so the variance includes the distance of the means.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((1,)), keras_bn.BatchNormalization(name="norm")]
    ... )
    >>> shifted = np.random.default_rng(0).normal(5.0, 1.0, (512, 1))
    >>> print(model.predict(shifted, batch_size=512, verbose=0).mean().round(1))
    5.0
    >>> keras_bn.adapt(model, prior=16)
    ['norm']
    >>> print(model.predict(shifted, batch_size=512, verbose=0).mean().round(1))
    0.1
    """
    require("keras_bn.adapt", "layers", "graph", "copy")
    if prior is not None and memory is not None:
        raise ValueError(
            "`prior` and `memory` exclude each other. Received: "
            f"prior={prior}, memory={memory}"
        )
    if memory is None and prior is None:
        prior = 16
    return _set(model, "adapt", prior, memory)


def unadapt(model: keras.Layer) -> list[str]:
    """Let inference use the moving statistics alone again: the inverse of `adapt`.

    Args:
        model: a built model or layer.

    Returns:
        The paths of the layers.

    Raises:
        TypeError, ValueError: as `adapt`.

    Example:

    >>> import keras_bn
    >>> layer = keras_bn.BatchNormalization(adapt_prior=16, name="norm")
    >>> layer.build((None, 4))
    >>> keras_bn.unadapt(layer), layer.adapt_prior
    (['norm'], None)
    """
    require("keras_bn.unadapt", "layers", "graph", "copy")
    return _set(model, "unadapt", None, None)


def _set(model, verb, prior, memory):
    view = ModelView(model)
    view.check_built()
    layers = check_any(view, verb)
    prior, memory = check_prior(prior), check_memory(memory)
    # Those that have, or get, weights for a running average.
    others = [
        layer
        for layer in layers.values()
        if memory is not None or layer.adapt_memory is not None
    ]
    if any(layer is model for layer in others):
        raise ValueError(
            f"'{model.name}' is a normalization itself, and `memory` takes other "
            "weights. Make a new layer with `adapt_memory`."
        )
    with scope(model):
        pairs = [(layer, _rebuilt(layer, prior, memory)) for layer in others]
    kinds = made_by_classes(view) if memory is not None else {}
    if pairs:
        exchange_alive(pairs)
    if kinds:
        warnings.warn(
            f"A file of '{model.name}' will not load: "
            f"{' and '.join(sorted(set(kinds.values())))} makes its own layers, "
            "without the weights that `memory` takes. `prior` takes none.",
            stacklevel=3,
        )
    for layer in layers.values():
        if memory is None and layer.adapt_memory is None:
            layer.adapt_prior = prior
    warn_of_skipped(view, layers, verb, stacklevel=3)
    return list(layers)


def _rebuilt(layer, prior, memory):
    """The layer with other weights: a running average from the moving statistics."""
    without = _RUNNING if memory is None else ()
    new = rebuild(
        layer, BatchNormalization, without, adapt_prior=prior, adapt_memory=memory
    )
    if memory is not None:
        for name, start in _RUNNING.items():
            # By way of NumPy: on JAX, two variables must not share a buffer.
            value = keras.ops.convert_to_numpy(getattr(new, start))
            getattr(new, name).assign(value)
    return new
