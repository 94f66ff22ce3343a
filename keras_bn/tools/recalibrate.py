"""Replacing the moving statistics of a model by those of a data set."""

from typing import Any, Literal

import keras

from keras_bn.passes.data import DataCallback, Logs, NoDataError, Verbose
from keras_bn.passes.statistics import Statistics
from keras_bn.surgery.arrays import float64
from keras_bn.surgery.norms import is_frozen, warn_of_others
from keras_bn.surgery.private import require
from keras_bn.tools.statistics import (
    Collector,
    assign,
    check_counts,
    layers_of,
    present,
    warn_of_data,
    warn_of_workers,
    with_prior,
)
from keras_bn.tools.steps import StepCallback


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
) -> Statistics:
    """Replace the moving statistics of a model by those of the data.

    The moving statistics are wrong after weights were averaged, after the data has
    changed, or after short training. This runs the data through the model once. Each
    batch is normalized by its own statistics; everything else is in inference. Then it
    merges the moments of all batches with their counts, so the statistics are those of
    the whole data set. It is `keras_bn.statistics` and `keras_bn.set_statistics` in one
    step.

    Nothing else changes: no other weights, no optimizer, no random state. If anything
    fails or you press Ctrl-C, the model does not change.

    Args:
        model: a built model, with `keras_bn` or Keras layers.
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
        The `Statistics` of the data: `Moments` by the path of the layer.

    Raises:
        ValueError: if there is nothing to recalibrate or no data; for endless data
            without `steps`; for a generator with `exact`, since it can be read only
            once.

    Warns:
        UserWarning: if a statistic rests on fewer than 100 elements, if the data ends
            before `steps` batches, for layers that it skips because their class has
            its own `call`, and for a model that other workers have, too.

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
    >>> statistics = keras_bn.recalibrate(model, np.arange(100.0)[:, None], verbose=0)
    >>> print(model.get_layer("bn").moving_mean.numpy(), statistics["bn"].count)
    [49.5] [100.]
    """
    require("keras_bn.recalibrate", "layers", "copy", "data")
    layers = layers_of(model, include_frozen)
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
    with Collector(model, layers) as collector:
        if exact:
            statistics = collector.in_order(
                data, prior, verbose, steps=steps, batch_size=batch_size
            )
        else:
            statistics = collector.at_once(
                data, verbose=verbose, steps=steps, batch_size=batch_size
            )
    collector.check_any()
    check_counts(statistics)
    warn_of_data(collector, statistics, prior)
    warn_of_others(model, stacklevel=4)
    warn_of_workers(model, stacklevel=4)
    assign(layers, with_prior(layers, statistics, prior))
    return statistics


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
            present(self._target)
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
        live = [layer for layer in present(target).values() if not is_frozen(layer)]
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
