"""Taking the statistics out of a model, and putting others in."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_bn.moments import Moments, corrected
from keras_bn.passes.compiled import Pass, Pool, moments_of
from keras_bn.passes.data import Verbose, check_call
from keras_bn.passes.progress import Progress
from keras_bn.passes.recorder import with_values
from keras_bn.passes.statistics import Statistics, check_fit, pooled
from keras_bn.surgery.arrays import float64, moving, restored, rolled_back
from keras_bn.surgery.graph import count_workers
from keras_bn.surgery.norms import is_frozen, normalizations, warn_of_others
from keras_bn.surgery.private import require

# Below this many elements, the standard error of a variance is over 14 %.
_FEW = 100
# The statistics of a layer, as far as it has them.
_NAMES = (
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
    "adapted_mean",
    "adapted_variance",
)


def statistics(
    model: keras.Model,
    data: Any = None,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    include_frozen: bool = False,
    verbose: Verbose = "auto",
) -> Statistics:
    """The statistics of a model's normalizations, as a value.

    With data, those that `keras_bn.recalibrate` would give the model, which does not
    change. Parts of a data set can be run in several processes: `keras_bn.pooled` of
    their statistics is that of one pass, if the parts are cut between batches. (Within
    a batch, samples are normalized together.)

    Args:
        model: a built model, with `keras_bn` or Keras layers.
        data: as in `keras_bn.recalibrate`, possibly empty; without data, the moving
            statistics, which do not say how many samples they rest on.
        steps, batch_size, verbose: as in `keras_bn.recalibrate`.
        include_frozen: whether to take the statistics of frozen layers, too, and to
            normalize by those of the batch there.

    Returns:
        `Statistics`: `Moments` by the path of the layer. A layer that the data does not
        reach has a count of 0.

    Raises:
        ValueError: if there are no layers to take statistics of, and for endless data
            without `steps`.

    Warns:
        UserWarning: for samples that are not finite, which do not count.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> norm = keras_bn.BatchNormalization(name="bn")
    >>> model = keras.Sequential([keras.Input((1,)), norm])
    >>> x = np.arange(100.0)[:, None]
    >>> day = keras_bn.statistics(model, x[:64], verbose=0)
    >>> night = keras_bn.statistics(model, x[64:], verbose=0)
    >>> keras_bn.set_statistics(model, keras_bn.pooled([day, night]))
    >>> print(norm.moving_mean.numpy(), keras_bn.pooled([day, night]).samples)
    [49.5] 100
    """
    require("keras_bn.statistics", "layers", "copy", "data")
    layers = layers_of(model, include_frozen or data is None)
    if data is None:
        return _moving(layers)
    with Collector(model, layers) as collector:
        of_data = collector.at_once(
            data, "reading", steps=steps, batch_size=batch_size, verbose=verbose
        )
    _warn_of_invalid(collector)
    warn_of_others(model)
    zeros = {path: np.zeros(layer.moving_mean.shape) for path, layer in layers.items()}
    empty = {path: Moments(0.0, zero, zero) for path, zero in zeros.items()}
    return Statistics({**empty, **of_data}, of_data.samples)


def set_statistics(model: keras.Model, statistics: Mapping[str, Moments]) -> None:
    """Replace the moving statistics of a model.

    Args:
        model: a built model, with `keras_bn` or Keras layers.
        statistics: what `keras_bn.statistics`, `pooled` or `Statistics.load` give, for
            all its normalizations; frozen ones may be left out. A channel that rests on
            no element, or is not finite, keeps its old statistics. A running average
            (`keras_bn.adapt`) begins again from the new ones.

    Raises:
        TypeError: if `statistics` is no mapping.
        ValueError: if the layers or their shapes are not those of the model, or if a
            layer rests on no element. Nothing has changed then.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((1,)), keras_bn.BatchNormalization(name="bn")]
    ... )
    >>> parts = [np.full((100, 1), value) for value in (1.0, 3.0)]
    >>> found = [keras_bn.statistics(model, part, verbose=0) for part in parts]
    >>> keras_bn.set_statistics(model, keras_bn.pooled(found))
    >>> layer = model.get_layer("bn")
    >>> print(layer.moving_mean.numpy(), layer.moving_variance.numpy())
    [2.] [1.]
    """
    require("keras_bn.set_statistics", "layers")
    layers = present(model)
    new = Statistics(statistics)
    left = {p: la for p, la in layers.items() if p in new or not is_frozen(la)}
    check_fit(new, _moving(left), "The statistics do not fit the model")
    check_counts(new)
    warn_of_workers(model)
    assign(layers, new)


@contextlib.contextmanager
def using(
    model: keras.Model, statistics: Mapping[str, Moments]
) -> Iterator[keras.Model]:
    """Give a model other statistics for a while.

    They are in the model itself, so in all threads. In the end it has its own again,
    to the bit, whatever happens.

    Args:
        model, statistics: as in `keras_bn.set_statistics`.

    Returns:
        A context, which gives the model.

    Raises:
        ValueError: as `keras_bn.set_statistics`.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential([keras.Input((1,)), keras_bn.BatchNormalization()])
    >>> night = keras_bn.statistics(model, np.full((100, 1), 5.0), verbose=0)
    >>> with keras_bn.using(model, night):
    ...     print(model.predict(np.array([[5.0]]), verbose=0))
    [[0.]]
    >>> print(model.layers[0].moving_mean.numpy())
    [0.]
    """
    require("keras_bn.using", "layers")
    variables = [
        variable
        for layer in present(model).values()
        for name in _NAMES
        if (variable := getattr(layer, name, None)) is not None
    ]
    with restored(variables):
        set_statistics(model, statistics)
        yield model


def _moving(layers):
    """The moving statistics of layers by path."""
    return Statistics(
        {path: Moments(np.nan, *moving(layer)) for path, layer in layers.items()}
    )


def with_prior(layers, statistics, prior):
    """The statistics of the data, pooled with `prior` samples of the old ones."""
    old = _moving({path: layers[path] for path in statistics})
    return pooled([old.counted(prior), statistics])


def check_counts(statistics):
    """Refuse statistics that rest on nothing."""
    if empty := [path for path, part in statistics.items() if not part.count.any()]:
        raise ValueError(
            f"No element of the data counts for {', '.join(empty)}: there is none, or "
            "all are masked or not finite. So there are no statistics."
        )


def warn_of_data(collector, statistics, prior):
    """Warn of what makes statistics worse than they look."""
    _warn_of_few(statistics, prior)
    _warn_of_invalid(collector)
    _warn_of_skew(collector.labels)
    if missing := [path for path in collector.doubles if path not in statistics]:
        warnings.warn(f"Not called, so not changed: {', '.join(missing)}", stacklevel=4)


def layers_of(model, include_frozen):
    """The layers to recalibrate, by path."""
    check_call(model)
    layers = present(model)
    if include_frozen:
        return layers
    live = {path: layer for path, layer in layers.items() if not is_frozen(layer)}
    if not live:
        raise ValueError(
            f"Every batch normalization of '{model.name}' is frozen. Pass "
            "`include_frozen=True` to recalibrate them anyway."
        )
    return live


def present(model):
    """The normalizations of a model by path; refuses one that has none."""
    if layers := normalizations(model):
        return layers
    raise ValueError(
        f"'{model.name}' has no batch normalization that could be recalibrated."
    )


class Collector(Pass):
    """Runs a model with batch statistics in some of its layers, and collects them."""

    def at_once(self, data, label="recalibrating", **options):
        """The statistics of all layers, in one pass."""
        return self._collected(data, label, **options)

    def in_order(self, data, prior, verbose, steps, batch_size):
        """The statistics of each layer when those before it are recalibrated."""
        options = {"steps": steps, "batch_size": batch_size, "verbose": 0}
        # Whether a layer is finished, and its statistics then. As arguments, so that
        # one trace serves all passes.
        states = {path: (False, *moving(la)) for path, la in self.doubles.items()}
        statistics: dict[str, Moments] = {}
        progress = Progress("recalibrating", len(self.doubles), verbose)
        while len(statistics) < len(self.doubles):
            new = self._collected(data, "", states=states, **options)
            path = next((path for path in new if path not in statistics), None)
            if path is None:
                break
            statistics[path] = new[path]
            one = Statistics({path: new[path]}, new.samples)
            whole = with_prior(self.doubles, one, prior)[path]
            values = {v.name: x for v, x in _assignments(self.doubles[path], whole)}
            states[path] = True, values["moving_mean"], values["moving_variance"]
            progress.update(len(statistics))
        progress.close(len(statistics))
        return Statistics(statistics, self.samples)

    def _collected(self, data, label, states=(), **options):
        self._pool = Pool()
        # Only what `fit` would take for the input: a tuple is several inputs.
        self.over((data,), label, states, **options)
        return Statistics(self._pool.moments(), self.samples)

    def step(self, batch, states):
        self._states = states
        self.forward(batch[0])

    def record(self, path, double, inputs, training=None, mask=None):
        outputs, moments = double.normalize_batch(inputs, mask)
        self.note("moments", path, *moments)
        if not self._states:
            return outputs
        finished, *statistics = self._states[path]
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


def _assignments(layer, moments):
    """The new statistics of a layer, as pairs of variable and array."""
    # Moving statistics, whose count is unknown, are taken as they are.
    as_they_are = np.isnan(moments.count)
    known = known_variance = (moments.count > 0) | as_they_are
    if getattr(layer, "unbiased", False) and not as_they_are.any():
        known_variance = moments.count > 1
        moments = corrected(moments, np)
    with np.errstate(invalid="ignore"):
        stddev = np.sqrt(moments.variance + layer.epsilon)
    mean, spread = (moments.mean, known), (stddev, known_variance)
    variance = moments.variance, known_variance
    new = mean, variance, spread, mean, spread, mean, variance
    for name, (value, usable) in zip(_NAMES, new, strict=True):
        variable = getattr(layer, name, None)
        if variable is not None:
            yield variable, np.where(usable, value, float64(variable))


def assign(layers, statistics):
    """Assign all statistics, or nothing if that is interrupted."""
    assignments = [
        assignment
        for path, moments in statistics.items()
        for assignment in _assignments(layers[path], moments)
    ]
    with rolled_back(variable for variable, _ in assignments):
        for variable, value in assignments:
            variable.assign(value)


def warn_of_workers(model, stacklevel=3):
    """Warn that statistics are assigned in this process only."""
    if (workers := count_workers(model)) > 1:
        warnings.warn(
            f"'{model.name}' has a replica in each of {workers} workers, and only that "
            "of this process gets the statistics. Do the same on all workers, with the "
            "same data; otherwise their replicas differ.",
            stacklevel=stacklevel,
        )


def _warn_of_few(statistics, prior):
    if prior or not statistics:
        return
    path = min(statistics, key=lambda path: statistics[path].count.min())
    if (count := statistics[path].count.min()) < _FEW:
        warnings.warn(
            f"The statistics of '{path}' rest on {count:.0f} elements only, fewer than "
            f"{_FEW}. Take more data, or keep some of the old statistics: `prior`.",
            stacklevel=5,
        )


def _warn_of_invalid(run):
    """Warn of samples and batches that were left out."""
    for message in run.left_out().values():
        warnings.warn(message, stacklevel=5)


def _warn_of_skew(labels):
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
            stacklevel=5,
        )
