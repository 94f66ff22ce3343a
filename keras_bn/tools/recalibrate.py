"""Replacing the moving statistics of a model by those of a data set."""

import warnings
from collections import Counter
from typing import Any, Literal

import keras
import numpy as np

from keras_bn.moments import Moments, corrected, merged
from keras_bn.passes.compiled import Pass, Pool, moments_of
from keras_bn.passes.data import (
    DataCallback,
    Logs,
    NoDataError,
    Verbose,
    check_call,
)
from keras_bn.passes.progress import Progress
from keras_bn.passes.recorder import with_values
from keras_bn.surgery.arrays import float64, moving, rolled_back
from keras_bn.surgery.norms import is_frozen, normalizations, warn_of_others
from keras_bn.surgery.private import require
from keras_bn.tools.steps import StepCallback

# Below this many elements, the standard error of a variance is over 14 %.
_FEW = 100


def recalibrate(
    model: keras.Model,
    data: Any,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    exact: bool = False,
    prior: float = 0,
    include_frozen: bool = False,
    verbose: Verbose = "auto",
) -> dict[str, Moments]:
    """Replace the moving statistics of a model by those of the data.

    The moving statistics are wrong after weights were averaged, after the data has
    changed, or after short training. This runs the data through the model once. Each
    batch is normalized by its own statistics; everything else is in inference. Then it
    merges the moments of all batches with their counts, so the statistics are those of
    the whole data set.

    Nothing else changes: no other weights, no optimizer, no random state. If anything
    fails or you press Ctrl-C, the model does not change.

    Args:
        model: a built model, with layers of ours or Keras's.
        data: what `fit` takes as its `x`: arrays, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator with `steps`. Labels and sample
            weights in it have no effect.
        steps: how many batches to take; all of them by default.
        batch_size: for arrays; 32 by default. Samples of one batch are normalized
            together: use the batch size of training, and a random order.
        exact: whether to go layer by layer, with all layers before it as they will be
            in inference. Then `predict(data)` equals training mode on the whole data
            as one batch. This reads the data once per normalization. It does not hold
            for a layer that the model calls in several places, since that has one set
            of statistics for all.
        prior: how many samples the present statistics count for: 0 forgets them; more
            keeps some of them if there is little data (Schneider et al. 2020).
        include_frozen: whether to change layers with `trainable=False` or
            `freeze_statistics=True`, too.
        verbose: `"auto"`, 0, 1 or 2, as in `fit`.

    Returns:
        A dict of the `Moments` found in the data, by the path of the layer.

    Raises:
        ValueError: if there is nothing to recalibrate or no data; for endless data
            without `steps`; for a generator with `exact`, since it can be read only
            once.

    Warns:
        UserWarning: if a statistic rests on fewer than 100 elements, if the data ends
            before `steps` batches, and for layers that it skips because their class
            has its own `call`.

    Source: Schneider et al., "Improving robustness against common corruptions by
    covariate shift adaptation", 2020. They average means and variances; this pools the
    samples of prior and data, so the variance includes the distance of their means.
    Pooled statistics: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021,
    section 3.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((1,)), keras_bn.BatchNormalization(name="bn")]
    ... )
    >>> found = keras_bn.recalibrate(model, np.arange(100.0)[:, None], verbose=0)
    >>> print(model.get_layer("bn").moving_mean.numpy(), found["bn"].count)
    [49.5] [100.]
    """
    require("keras_bn.recalibrate", "layers", "copy", "data")
    layers = _layers(model, include_frozen)
    if exact and hasattr(data, "__next__"):
        raise ValueError(
            "`exact=True` reads the data once for each layer, and a generator can be "
            "read only once. Give arrays, a tf.data.Dataset or a PyDataset."
        )
    if prior < 0:
        raise ValueError(f"`prior` must be 0 or greater. Received: prior={prior}")
    return replace_statistics(
        model,
        layers,
        data,
        steps=steps,
        batch_size=batch_size,
        exact=exact,
        prior=prior,
        verbose=verbose,
    )


def replace_statistics(
    model, layers, data, *, steps, batch_size, exact=False, prior=0, verbose=0
):
    """Replace the moving statistics of some layers; all others are in inference.

    Args:
        model, data, steps, batch_size, exact, prior, verbose: as in `recalibrate`.
        layers: the normalizations to change, by path.

    Returns:
        As `recalibrate`.
    """
    options = {"steps": steps, "batch_size": batch_size}
    with _Collector(model, layers) as collector:
        if exact:
            moments = collector.in_order(data, prior, verbose, **options)
        else:
            moments = collector.at_once(data, verbose=verbose, **options)
    if empty := [path for path, part in moments.items() if not part.count.any()]:
        raise ValueError(
            f"No element of the data counts for {', '.join(empty)}: all are masked or "
            "not finite, so there are no statistics."
        )
    _warn_of_few(moments, prior)
    _warn_of_invalid(collector)
    _warn_of_skew(model, collector.labels)
    warn_of_others(model, stacklevel=4)
    if missing := [path for path in layers if path not in moments]:
        warnings.warn(f"Not called, so not changed: {', '.join(missing)}", stacklevel=3)
    _assign(
        assignment
        for path, part in moments.items()
        for assignment in _assignments(
            layers[path], _with_prior(layers[path], part, prior, collector.samples)
        )
    )
    return moments


def _layers(model, include_frozen):
    """The layers to recalibrate, by path."""
    check_call(model)
    found = _present(model)
    if include_frozen:
        return found
    live = {path: layer for path, layer in found.items() if not is_frozen(layer)}
    if not live:
        raise ValueError(
            f"Every batch normalization of '{model.name}' is frozen. Pass "
            "`include_frozen=True` to recalibrate them anyway."
        )
    return live


def _present(model):
    """The normalizations of a model by path; refuses one that has none."""
    if found := normalizations(model):
        return found
    raise ValueError(
        f"'{model.name}' has no batch normalization that could be recalibrated."
    )


class _Collector(Pass):
    """Runs a model with batch statistics in some of its layers, and collects them.

    Attributes:
        labels: how often each label of the data came, by label; None if unknown.
    """

    def at_once(self, data, **options):
        """The moments of all layers by path, in one pass."""
        return self._collected(data, "recalibrating", **options)

    def in_order(self, data, prior, verbose, steps, batch_size):
        """The moments of each layer when those before it are recalibrated."""
        options = {"batch_size": batch_size, "verbose": 0}
        # Whether a layer is finished, and its statistics then. As arguments, so that
        # one trace serves all passes.
        given = {path: (False, *moving(la)) for path, la in self.doubles.items()}
        first = self._collected(data, "", steps=1, given=given, **options)
        # Those that only later batches reach are appended when a pass has shown them.
        order, pooled = list(first), {}
        progress = Progress("recalibrating", len(order), verbose)
        for number, path in enumerate(order, 1):
            moments = self._collected(data, "", steps=steps, given=given, **options)
            order += [other for other in moments if other not in order]
            pooled[path] = moments[path]
            double = self.doubles[path]
            whole = _with_prior(double, pooled[path], prior, self.samples)
            new = {v.name: value for v, value in _assignments(double, whole)}
            given[path] = True, new["moving_mean"], new["moving_variance"]
            progress.update(number)
        progress.close(len(pooled))
        return pooled

    def _collected(self, data, label, given=(), **options):
        self._pool, self.labels = Pool(), _Labels(self.model)
        # Only what `fit` would take for the input: a tuple is several inputs.
        self.over((data,), label, given, **options)
        return self._pool.moments()

    def step(self, batch, given):
        self._given = given
        self.forward(batch[0])

    def record(self, path, double, inputs, training=None, mask=None):
        outputs, moments = double.normalize_batch(inputs, mask)
        self.note("moments", path, *moments)
        if not self._given:
            return outputs
        finished, *statistics = self._given[path]
        of_batch = moments.mean, moments.variance
        variables = double.moving_mean, double.moving_variance
        new = [
            keras.ops.where(finished, keras.ops.cast(known, present.dtype), present)
            for known, present in zip(statistics, of_batch, strict=True)
        ]
        with with_values(double, zip(variables, new, strict=True)):
            return double.call(inputs, training=False, mask=mask)

    def take(self, notes, batch, samples):
        self._pool.add(moments_of(notes))
        self.labels.add(batch[1])


class _Labels:
    """How often each class comes in the labels of the data.

    Args:
        model: the model that tells the classes apart.
    """

    def __init__(self, model):
        shape: Any = getattr(model, "output_shape", None)
        plain = isinstance(shape, tuple) and len(shape) == 2
        self.classes = shape[-1] if plain else None
        self._counts: Counter = Counter()

    def add(self, y):
        """Add the labels of a batch; None for none."""
        if self.classes is None or y is None or isinstance(y, list | tuple | dict):
            return
        y = np.asarray(keras.ops.convert_to_numpy(y))
        if y.ndim == 2 and y.shape[-1] == self.classes > 1:
            y = y.argmax(-1)
        if y.ndim > 2 or not np.issubdtype(y.dtype, np.integer):
            self.classes = None
            return
        labels, counts = np.unique(y, return_counts=True)
        self._counts.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))

    @property
    def effective(self):
        """The effective number of classes: that of a uniform one of this entropy."""
        counts = np.array(list(self._counts.values()), "float64")
        share = counts / counts.sum()
        return float(np.exp(-(share * np.log(share)).sum())) if counts.size else None


def _with_prior(layer, moments, prior, samples):
    """The moments of the data, pooled with `prior` samples of the old statistics."""
    mean, variance = moving(layer)
    known = np.isfinite(mean) & np.isfinite(variance)
    elements = prior * moments.count / samples
    present = Moments(np.where(known, elements, 0.0), mean, variance)
    return merged(present, moments, np)


def _assignments(layer, moments):
    """The new statistics of a layer, as pairs of variable and array."""
    known = known_variance = moments.count > 0
    if getattr(layer, "unbiased", False):
        known_variance = moments.count > 1
        moments = corrected(moments, np)
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
            yield variable, np.where(usable, value, float64(variable))


def _assign(assignments):
    """Assign all, or nothing if that is interrupted."""
    assignments = list(assignments)
    with rolled_back(variable for variable, _ in assignments):
        for variable, value in assignments:
            variable.assign(value)


def _warn_of_few(found, prior):
    if prior or not found:
        return
    path = min(found, key=lambda path: found[path].count.min())
    if (count := found[path].count.min()) < _FEW:
        warnings.warn(
            f"The statistics of '{path}' rest on {count:.0f} elements only, fewer than "
            f"{_FEW}. Take more data, or keep some of the old statistics: `prior`.",
            stacklevel=4,
        )


def _warn_of_invalid(run):
    """Warn of samples and batches that were left out."""
    if run.invalid:
        warnings.warn(
            f"{run.invalid} of {run.invalid + run.samples} samples in the data are not "
            f"finite and were left out; the first is sample {run.first_invalid}.",
            stacklevel=4,
        )
    if run.partial:
        path, count = run.partial.most_common(1)[0]
        warnings.warn(
            f"The input of '{path}' was not finite in {count} of {run.batches} "
            "batches, though the data was. Those channels were left out there.",
            stacklevel=4,
        )


def _warn_of_skew(model, labels):
    """Warn if the labels in the data leave out classes of the model."""
    classes, effective = labels.classes, labels.effective
    if classes is None or classes < 2 or effective is None:
        return
    if effective < classes / 2:
        warnings.warn(
            f"The labels in the data are those of {effective:.1f} classes in effect, "
            f"and the model tells {classes} apart: such statistics may be wrong for "
            "the others. Take balanced data, or keep some of the old statistics: "
            "`prior`.",
            stacklevel=4,
        )


class Recalibrate(DataCallback, StepCallback):
    """Recalibrates a model during `fit`.

    It does so after the last step of each epoch, before validation and before other
    callbacks save the model, so that all of them have statistics that belong to the
    weights; or once at the end. Its place in the list of callbacks does not matter,
    with two exceptions: list it after `keras.callbacks.SwapEMAWeights` and before what
    saves the averaged weights; and before what saves the model if Keras does not know
    how many steps an epoch has, as with a generator, for then it acts in the first
    epoch when its turn comes.

    It does not end a training: once all layers are frozen, or the data has ended, it
    warns and does nothing more.

    Args:
        data: as in `recalibrate`; a generator goes on from epoch to epoch.
        when: `"epoch"` or `"end"`.
        model: the model to recalibrate, if that is only a part of the fitted one, such
            as the generator of a GAN.
        verbose: as in `recalibrate`.
        **options: further arguments of `recalibrate`.

    Raises:
        ValueError: when `fit` begins, if the model has no batch normalization, or for
            endless data without `steps`.

    Warns:
        UserWarning: once in a `fit`, if every layer is frozen or no data is left.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization()])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(5.0, 1.0, (200, 2))
    >>> history = model.fit(x, x, callbacks=[keras_bn.Recalibrate(x)], verbose=0)
    >>> print(np.allclose(model.layers[0].moving_mean, x.mean(0)))
    True
    """

    def __init__(
        self,
        data: Any,
        *,
        when: Literal["epoch", "end"] = "epoch",
        model: keras.Model | None = None,
        verbose: Verbose = 0,
        **options: Any,
    ) -> None:
        super().__init__(data, model)
        if when not in ("epoch", "end"):
            raise ValueError(f"`when` must be 'epoch' or 'end'. Received: {when!r}")
        self.when = when
        self._options = {"verbose": verbose, **options}
        self._fitting = False
        self._weights: list[float] | None = None
        self._length: int | None = None

    def on_train_begin(self, logs: Logs = None) -> None:
        self._check(self._options.get("steps"))
        if self._target.built:
            _present(self._target)
        self._fitting, self._weights = True, None
        self._length = self.epoch_length

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self._weights = None
        self.count_steps()
        if self.when == "epoch" and self.done_of_epoch == self._length:
            self._recalibrate()

    def on_test_begin(self, logs: Logs = None) -> None:
        if self._fitting and self.when == "epoch":
            self._recalibrate()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._length = self.done_of_epoch
        if self.when == "epoch":
            self._recalibrate()

    def on_train_end(self, logs: Logs = None) -> None:
        self._recalibrate()
        self._fitting = False

    def _recalibrate(self):
        """Recalibrate, unless the statistics already belong to these weights."""
        assert self.model is not None  # on JAX, this brings the variables up to date
        target = self._target
        weights = [float64(v).sum() for v in target.trainable_variables]
        if weights == self._weights:
            return
        live = [layer for layer in _present(target).values() if not is_frozen(layer)]
        if not live and not self._options.get("include_frozen"):
            self._warn_once(
                "frozen",
                f"every batch normalization of '{target.name}' is frozen, so there is "
                "nothing to recalibrate; training goes on.",
            )
            return
        try:
            recalibrate(target, self._data, **self._options)
        except NoDataError:
            self._warn_once(
                "ended",
                "the data has no batch left, so the statistics are no longer "
                "recalibrated; training goes on. A generator must give `steps` batches "
                "for each epoch.",
            )
        self._weights = weights
