"""Replacing the moving statistics of a model by those of a data set."""

import contextlib
import warnings

import keras
import numpy as np

from keras_bn.layer import BatchNormalization
from keras_bn.moments import Moments
from keras_bn.tools.convert import remade
from keras_bn.tools.copying import copy_model
from keras_bn.tools.graph import (
    intercepted,
    scope,
    state_kept,
    walk,
)
from keras_bn.tools.norms import is_normalization

# Below this many elements, the standard error of a variance is over 14 %.
_FEW = 100


def recalibrate(
    model,
    data,
    *,
    steps=None,
    batch_size=None,
    exact=False,
    prior=0,
    include_frozen=False,
    verbose="auto",
):
    """Replace the moving statistics of a model by those of the data.

    After averaging weights, after a change of the data, or where training was short,
    the moving statistics are not those that the layers meet. This runs the data
    through the model once, each batch normalized by its own statistics while all else
    is in inference, and merges the moments of all batches with their counts: the
    statistics are pooled over the data set, however it was cut into batches.

    Nothing else changes: neither other weights, nor the optimizer, nor random state.
    If anything goes wrong, Ctrl-C included, the model is as it was.

    Args:
        model: a built model, with layers of ours or Keras's.
        data: what `fit` takes as its `x`: arrays, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator with `steps`. Labels and sample
            weights in it are passed over.
        steps: how many batches to take; all of them by default.
        batch_size: for arrays; 32 by default. Samples of one batch are normalized
            together, so it should be what training used, and the order random.
        exact: whether to go layer by layer, each seeing the layers before it as they
            will be in inference: afterwards, `predict(data)` is what the training
            mode gives for the whole data as one batch. It reads the data as often as
            the model has normalizations. Layers that a model calls in several places
            have one set of statistics for all, and there it cannot hold.
        prior: how many samples the present statistics count for: 0 forgets them, more
            holds on to them, when the data is scarce (Schneider et al. 2020).
        include_frozen: whether to change layers with `trainable=False` or
            `freeze_statistics=True`, too.
        verbose: `"auto"`, 0, 1 or 2, as in `fit`.

    Returns:
        A dict of the `Moments` found in the data, by the path of the layer.

    Raises:
        ValueError: if there is nothing to recalibrate or no data; for a generator
            with `exact`, which can be read only once.

    Warns:
        UserWarning: if some statistic rests on fewer than 100 elements.

    Source: Schneider et al., "Improving robustness against common corruptions by
    covariate shift adaptation", 2020. There, means and variances are blended; here,
    the prior's samples and the data's are pooled, so that the distance of their means
    is part of the variance. Pooled statistics: Wu and Johnson, "Rethinking 'Batch' in
    BatchNorm", 2021, section 3.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((1,)), keras_bn.BatchNormalization(name="bn")]
    ... )
    >>> found = keras_bn.recalibrate(model, np.arange(100.0)[:, None], verbose=0)
    >>> print(model.get_layer("bn").moving_mean.numpy(), found["bn"].count)
    [49.5] [100.]
    """
    layers = _layers(model, include_frozen)
    if exact and hasattr(data, "__next__"):
        raise ValueError(
            "`exact=True` reads the data once for each layer, and a generator can be "
            "read only once. Give arrays, a tf.data.Dataset or a PyDataset."
        )
    if prior < 0:
        raise ValueError(f"`prior` must be 0 or greater. Received: prior={prior}")
    with scope(model), state_kept(model):
        collector = _Collector(model, layers)
        options = {"steps": steps, "batch_size": batch_size}
        if exact:
            found = collector.in_order(data, prior, verbose, **options)
        else:
            found = collector.at_once(data, verbose=verbose, **options)
    if not collector.samples:
        raise ValueError("There is no data: not one batch came.")
    _warn_of_few(found, prior)
    _warn_of_skew(model, collector.labels)
    if missing := [path for path in layers if path not in found]:
        warnings.warn(f"Not called, so not changed: {', '.join(missing)}", stacklevel=2)
    _assign(
        assignment
        for path, moments in found.items()
        for assignment in _assignments(
            layers[path], _with_prior(layers[path], moments, prior, collector.samples)
        )
    )
    return found


def _layers(model, include_frozen):
    """The layers to recalibrate, by path."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"Expected a Keras model. Received: {model!r}")
    if not model.built:
        raise ValueError(
            f"'{model.name}' is not built, so it has no statistics yet. Call it on "
            "data, or build it, first."
        )
    found = {path: layer for path, layer in walk(model) if is_normalization(layer)}
    if not found:
        raise ValueError(
            f"'{model.name}' has no batch normalization that could be recalibrated."
        )
    if include_frozen:
        return found
    live = {path: layer for path, layer in found.items() if not is_frozen(layer)}
    if not live:
        raise ValueError(
            f"Every batch normalization of '{model.name}' is frozen. To recalibrate "
            "them all the same, pass `include_frozen=True`."
        )
    return live


def is_frozen(layer):
    """Whether training leaves the statistics of a layer, ours or Keras's, alone."""
    return not layer.trainable or getattr(layer, "freeze_statistics", False)


class _Reached(BaseException):
    """A pass has seen all it is about. No Exception, so that Keras lets it through."""


class Pass(keras.Model):
    """Keras's way through all kinds of data, progress bar and replicas included."""

    def __init__(self, step):
        super().__init__()
        self._step = step
        self.run_eagerly = True

    def predict_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        self._step(x, y)
        return keras.ops.zeros((1,))


class _Collector:
    """Runs a model with batch statistics in some of its layers, and gathers these.

    A twin stands in for each such layer, so that nothing in the model is touched.

    Args:
        model: the model.
        layers: the layers, by path.
    """

    def __init__(self, model, layers):
        self._model, self._layers = model, layers
        self._twins = {path: twin_of(layer) for path, layer in layers.items()}
        self._pass = Pass(self._step)
        self._finished: set[str] = set()
        self._only: str | None = None
        self._probing = False
        self._calls: dict[str, int] = {}
        self.labels: list = []

    def at_once(self, data, **options):
        """The moments of all layers, by path, in one pass."""
        self.samples = 0
        self._found: dict[str, Moments] = {}
        calls = [(layer, self._stand_in(path)) for path, layer in self._layers.items()]
        with intercepted(calls):
            try:
                self._pass.predict(data, **options)
            except UnboundLocalError:  # Keras has no outputs to join if no batch came
                if self.samples:
                    raise
        return self._found

    def in_order(self, data, prior, verbose, steps, batch_size):
        """The moments of each layer when those before it are recalibrated."""
        found: dict[str, Moments] = {}
        options = {"steps": steps, "batch_size": batch_size, "verbose": 0}
        self._probing = True
        order = list(self.at_once(data, **options))
        self._probing = False
        calls = dict(self._calls)
        bar = keras.utils.Progbar(
            len(order), unit_name="layer", verbose=1 if verbose == "auto" else verbose
        )
        for path in order:
            self._only, self._last = path, calls[path]
            found[path] = self.at_once(data, **options)[path]
            twin = self._twins[path]
            moments = _with_prior(twin, found[path], prior, self.samples)
            _assign(_assignments(twin, moments))
            self._finished.add(path)
            bar.add(1)
        return found

    def _step(self, x, y):
        self.samples += keras.tree.flatten(x)[0].shape[0]
        if y is not None and not self._finished:
            self.labels.append(y)
        self._calls = {}
        self._pass.stop_predicting = self._probing
        with contextlib.suppress(_Reached):
            self._model(x, training=False)

    def _stand_in(self, path):
        def call(inputs, training=None, mask=None):
            twin = self._twins[path]
            if path in self._finished:
                return twin.call(inputs, training=False, mask=mask)
            y, moments = twin.normalize_batch(inputs, mask)
            self._calls[path] = self._calls.get(path, 0) + 1
            if self._only in (None, path):
                self._take(path, moments)
            if self._only == path and self._calls[path] == self._last:
                raise _Reached
            return y

        return call

    def _take(self, path, moments):
        try:
            count, mean, variance = map(_float64, moments)
        except NotImplementedError:
            raise ValueError(
                f"'{path}' is called inside a compiled function, where its statistics "
                "cannot be had. Call the layers of the model directly in it."
            ) from None
        # A channel that is not finite in a batch takes no part with that batch.
        finite = np.isfinite(mean) & np.isfinite(variance)
        moments = Moments(np.where(finite, count, 0.0), mean, variance)
        if path in self._found:
            merged = self._found[path].merge(moments)
            moments = Moments(*map(_float64, merged))
        self._found[path] = moments


def twin_of(layer):
    """A layer of ours with the config and weights of the given one."""
    return remade(copy_model(layer)[0], BatchNormalization)


def _with_prior(layer, moments, prior, samples):
    """The moments of the data and those of `prior` samples as the layer knows them."""
    mean, variance = _float64(layer.moving_mean), _float64(layer.moving_variance)
    known = np.isfinite(mean) & np.isfinite(variance)
    elements = prior * moments.count / samples
    present = Moments(np.where(known, elements, 0.0), mean, variance)
    return Moments(*map(_float64, present.merge(moments)))


def _assignments(layer, moments):
    """What each statistic of a layer becomes, as pairs of variable and array."""
    known = known_variance = moments.count > 0
    if getattr(layer, "unbiased", False):
        known_variance = moments.count > 1
        moments = Moments(*map(_float64, moments.unbiased()))
    with np.errstate(invalid="ignore"):
        stddev = np.sqrt(moments.variance + layer.epsilon)
    new = {
        "moving_mean": (moments.mean, known),
        "moving_variance": (moments.variance, known_variance),
        "moving_stddev": (stddev, known_variance),
        "renorm_mean": (moments.mean, known),
        "renorm_stddev": (stddev, known_variance),
    }
    for name, (value, usable) in new.items():
        variable = getattr(layer, name, None)
        if variable is not None:
            yield variable, np.where(usable, value, _float64(variable))


def _assign(assignments):
    """Assign all, or, if that is interrupted, nothing."""
    assignments = list(assignments)
    before = [keras.ops.convert_to_numpy(variable) for variable, _ in assignments]
    try:
        for variable, value in assignments:
            variable.assign(value)
    except BaseException:
        for (variable, _), value in zip(assignments, before, strict=True):
            variable.assign(value)
        raise


def _float64(value):
    return np.asarray(keras.ops.convert_to_numpy(value), "float64")


def _warn_of_few(found, prior):
    if prior or not found:
        return
    path = min(found, key=lambda path: found[path].count.min())
    if (count := found[path].count.min()) < _FEW:
        warnings.warn(
            f"The statistics of '{path}' rest on {count:.0f} elements only, fewer than "
            f"{_FEW}. Take more data, or hold on to the present statistics by `prior`.",
            stacklevel=3,
        )


def _warn_of_skew(model, labels):
    """Warn if labels that came with the data leave out classes of the model."""
    shape = getattr(model, "output_shape", None)
    if not labels or not isinstance(shape, tuple) or len(shape) != 2:
        return
    classes = shape[-1]
    labels = np.concatenate([np.asarray(y) for y in labels])
    if labels.ndim == 2 and labels.shape[-1] == classes > 1:
        labels = labels.argmax(-1)
    if labels.ndim > 2 or not np.issubdtype(labels.dtype, np.integer) or classes < 2:
        return
    share = np.unique(labels, return_counts=True)[1] / labels.size
    effective = np.exp(-(share * np.log(share)).sum())
    if effective < classes / 2:
        warnings.warn(
            f"The labels in the data are those of {effective:.1f} classes in effect, "
            f"and the model tells {classes} apart: statistics of a skewed stream may "
            "serve the others badly. Take balanced data, or hold on to the present "
            "statistics by `prior`.",
            stacklevel=3,
        )


class Recalibrate(keras.callbacks.Callback):
    """Recalibrates a model while it is being fitted.

    After the training of each epoch and before its validation, so that validation
    and saved checkpoints see statistics that belong to the weights; or once at the
    end. Listed after `keras.callbacks.SwapEMAWeights`, it does so for the averaged
    weights while they are in the model, and again for the others.

    Args:
        data: as in `recalibrate`; a generator is read on from epoch to epoch.
        when: `"epoch"` or `"end"`.
        verbose: as in `recalibrate`.
        **options: further arguments of `recalibrate`.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization()])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(5.0, 1.0, (200, 2))
    >>> history = model.fit(x, x, callbacks=[keras_bn.Recalibrate(x)], verbose=0)
    >>> print(np.allclose(model.layers[0].moving_mean, x.mean(0)))
    True
    """

    def __init__(self, data, *, when="epoch", verbose=0, **options):
        super().__init__()
        if when not in ("epoch", "end"):
            raise ValueError(f"`when` must be 'epoch' or 'end'. Received: {when!r}")
        self.when = when
        self._data = data
        self._options = {"verbose": verbose, **options}
        self._fitting = False

    def on_train_begin(self, logs=None):
        self._fitting, self._weights = True, None

    def on_train_batch_end(self, batch, logs=None):
        self._weights = None

    def on_test_begin(self, logs=None):
        if self._fitting and self.when == "epoch":
            self._recalibrate()

    def on_epoch_end(self, epoch, logs=None):
        if self.when == "epoch":
            self._recalibrate()

    def on_train_end(self, logs=None):
        self._recalibrate()
        self._fitting = False

    def _recalibrate(self):
        """Recalibrate, unless the statistics belong to these very weights already."""
        weights = [
            float(keras.ops.sum(keras.ops.cast(v, "float64")))
            for v in self.model.trainable_variables
        ]
        if weights != self._weights:
            recalibrate(self.model, self._data, **self._options)
            self._weights = weights
