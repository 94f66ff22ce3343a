"""What counts as a problem of a batch normalization: thresholds and rules."""

from typing import Any, NamedTuple

import numpy as np

from keras_bn.diagnosis.fixes import Fix
from keras_bn.diagnosis.records import MeasuredLayer
from keras_bn.diagnosis.rules import ERROR, NOTE, RULES, SEVERITIES, WARNING

# The thresholds, each with its reason.

# Moving statistics lag behind weights that still change, so some drift is normal.
# If a channel is off by a quarter of a standard deviation, a tenth of its values change
# sign (for a normal distribution), and a ReLU treats them differently. A ratio of 1.25
# is a variance that is too large by half.
TYPICAL_MEAN_DRIFT = 0.25
TYPICAL_STDDEV_RATIO = 1.25
# If one channel is off by a whole standard deviation, or a factor of 2, the next layers
# get inputs that they have not seen in training.
WORST_MEAN_DRIFT = 1.0
WORST_STDDEV_RATIO = 2.0
# Standard errors from n samples: 1/√n standard deviations for a mean, 1/√(2n) for the
# logarithm of a standard deviation. This many of them are tolerated.
SIGMAS = 3.0
# After t steps, momentum^t of the initial values is left. Below a twentieth, this
# matters less than the lag of the statistics.
INITIAL_WEIGHT = 0.05
# Below 16 elements, the standard error of a variance, √(2/n), is over a third.
FEW_ELEMENTS = 16
# A channel whose normalized values have a smaller standard deviation gives only beta:
# epsilon is ten thousand times its variance.
DEAD_SPREAD = 0.01
# A thousandth of gamma's initial value of 1 passes on nothing that matters.
SMALL_GAMMA = 1e-3
# If a mean is this many standard deviations from zero, a moving mean that is off by 1 %
# is off by a standard deviation, and half precision rounds the inputs to a few numbers.
LARGE_MEAN = 100.0
# In more than this share of channels, no signal is a warning, else a note.
MANY = 0.1
# The outputs of a healthy model differ only by the noise of the batches. If they differ
# by half their spread more than that, the predictions are others.
OUTPUT_GAP = 0.5
# Labels tell how much it matters: a loss larger by half, or five points of accuracy,
# each beyond noise: that of the batches in the outputs, and that of few samples.
LOSS_RATIO = 1.5
ACCURACY_LOSS = 0.05

# Of a model that Keras calls without `training`.
_WITHOUT_TRAINING = (
    "the `call` of the model takes no `training`, so `fit` runs all of it as in "
    "inference"
)
_TAKE_TRAINING = "def call(self, inputs, training=None), and train again"


class Finding(NamedTuple):
    """One thing that a diagnosis found.

    Args:
        kind: such as `"stale-statistics"`.
        layer: the path of the layer, or the name of the model.
        severity: `"error"`, `"warning"` or `"note"`.
        message: what is wrong, in a sentence.
        remedy: the code that fixes it.
        fix: the `Fix` that applies it, or None if code cannot.
    """

    kind: str
    layer: str
    severity: str
    message: str
    remedy: str
    fix: Fix | None = None

    @property
    def rule(self) -> str:
        """The id of its `Rule`, such as `"BN005"`."""
        return RULES[self.kind].id

    @property
    def tool(self) -> str | None:
        """The function of keras_bn that fixes it, such as `"recalibrate"`, or None."""
        return self.fix and self.fix.tool

    def __str__(self) -> str:
        return f"{self.severity}: {self.layer}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """The finding in plain types, ready for JSON."""
        keys = "rule", "kind", "layer", "severity", "message", "remedy", "tool"
        return {key: getattr(self, key) for key in keys}


def findings(record):
    """What is wrong with a model, most severe first.

    Args:
        record: a `ModelRecord`.

    Returns:
        A list of `Finding`.
    """
    results = []
    for layer in record.layers:
        for rule in _STATISTICS:
            if finding := rule(layer, record):
                results.append(finding)
                break  # the later ones would follow from this one
        for rule in _LAYER:
            if finding := rule(layer, record):
                results.append(finding)
    results += [finding for of in _MODEL if (finding := of(record))]
    return sorted(results, key=lambda finding: SEVERITIES.index(finding.severity))


def _recalibrate(layer):
    return Fix("recalibrate", include_frozen=layer.frozen)


def _non_finite(layer, record):
    bad = ~(np.isfinite(layer.moving_mean) & np.isfinite(layer.moving_variance))
    if bad.any():
        convert = "model = keras_bn.from_keras(model); " if layer.keras else ""
        return Finding(
            "non-finite-statistics",
            layer.layer,
            ERROR,
            f"The moving statistics of {_of(bad)} are NaN or infinite, and so is the "
            "output in inference.",
            f"{convert}{_recalibrate(layer)}",
            _recalibrate(layer),
        )


def _negative_variance(layer, record):
    bad = layer.moving_variance < 0
    if bad.any():
        return Finding(
            "negative-variance",
            layer.layer,
            ERROR,
            f"The moving variance of {_of(bad)} is negative.",
            str(_recalibrate(layer)),
            _recalibrate(layer),
        )


def _never_updated(layer, record):
    if layer.initial and layer.inference_mode and not record.trains:
        return Finding(  # other statistics would be others than the training had
            "never-updated",
            layer.layer,
            ERROR,
            "The moving statistics are still the initial values, also in training: "
            f"{_WITHOUT_TRAINING}.",
            _TAKE_TRAINING,
        )
    if layer.initial:
        return Finding(
            "never-updated",
            layer.layer,
            ERROR,
            "The moving statistics are still the initial values: no training step has "
            "updated them.",
            str(_recalibrate(layer)),
            _recalibrate(layer),
        )


def _momentum_too_slow(layer, record):
    if layer.debias or layer.frozen or layer.inference_mode or not record.steps:
        return None
    left = layer.momentum**record.steps
    if left > INITIAL_WEIGHT and _is_stale(layer, record):
        momentum = max(0.0, np.floor(100 * INITIAL_WEIGHT ** (1 / record.steps)) / 100)
        return Finding(
            "momentum-too-slow",
            layer.layer,
            WARNING,
            f"After {record.steps} step{'s' * (record.steps > 1)} at momentum "
            f"{layer.momentum:g}, {left:.0%} of "
            "the moving statistics is still the initial value. They are off by "
            f"{_drift(layer)}. Training with momentum={momentum:g} prevents that.",
            str(_recalibrate(layer)),
            _recalibrate(layer),
        )


def _stale(layer, record):
    if _is_stale(layer, record):
        return Finding(
            "stale-statistics",
            layer.layer,
            NOTE if layer.frozen or layer.inference_mode else WARNING,
            f"The moving statistics are not those of the data: off by {_drift(layer)}.",
            str(_recalibrate(layer)),
            _recalibrate(layer),
        )


def _is_stale(layer, record):
    if not isinstance(layer, MeasuredLayer):
        return False
    mean, stddev = np.abs(layer.mean_drift), np.abs(np.log(layer.stddev_ratio))
    known = layer.data.count > 1
    if not known.any():
        return False
    mean, stddev = mean[known], stddev[known]
    of_mean = SIGMAS / np.sqrt(record.samples)
    of_stddev = of_mean / np.sqrt(2)
    return bool(
        np.median(mean) > TYPICAL_MEAN_DRIFT + of_mean
        or np.median(stddev) > np.log(TYPICAL_STDDEV_RATIO) + of_stddev
        or mean.max() > WORST_MEAN_DRIFT + of_mean
        or stddev.max() > np.log(WORST_STDDEV_RATIO) + of_stddev
    )


def _drift(layer):
    drift = layer.drift
    return (
        f"{drift.mean:.2g} standard deviations in the median and "
        f"{drift.worst_mean:.2g} in the worst channel, with a standard deviation "
        f"{drift.ratio:.2g} times that of the data in the median and "
        f"{drift.worst_ratio:.2g} times in the worst"
    )


def _inputs(layer):
    """The channels in which the inputs of a layer are known, their mean and variance.

    These are the moments of the data; without data, the moving statistics as far as
    they are usable.
    """
    if isinstance(layer, MeasuredLayer):
        return layer.data.count > 1, layer.data.mean, layer.data.variance
    mean, variance = layer.moving_mean, layer.moving_variance
    usable = np.isfinite(mean) & np.isfinite(variance) & (variance >= 0)
    usable &= not layer.initial
    return usable, np.where(usable, mean, 0), np.where(usable, variance, 1)


def _is_dead(layer):
    """Which channels hardly vary."""
    known, _, variance = _inputs(layer)
    spread = np.sqrt(variance / np.maximum(variance + layer.epsilon, 1e-30))
    return known & (spread < DEAD_SPREAD)


def _dead_channel(layer, record):
    dead = _is_dead(layer)
    if dead.any():
        within = "over the data" if record.has_data else "by their moving variance"
        array = "data.variance" if record.has_data else "moving_variance"
        return Finding(
            "dead-channel",
            layer.layer,
            WARNING if dead.mean() > MANY else NOTE,
            f"{_of(dead, start=True)} hardly vary {within}: the output is beta.",
            f"np.flatnonzero(report.layer({layer.layer!r}).{array} < "
            f"{DEAD_SPREAD**2 * layer.epsilon:.1g}) lists them; look at what comes "
            "before: units that have died, inputs that are constant or far too small",
        )


def _large_mean(layer, record):
    known, mean, variance = _inputs(layer)
    stddevs = np.abs(mean) / np.sqrt(np.maximum(variance + layer.epsilon, 1e-30))
    large = known & (stddevs > LARGE_MEAN) & ~_is_dead(layer)
    if large.any():
        return Finding(
            "large-mean",
            layer.layer,
            WARNING,
            f"The mean of {_of(large)} is up to {stddevs[large].max():,.0f} standard "
            "deviations from zero: a small error of the moving mean, or rounding in "
            "half precision, spoils the output.",
            "normalize the inputs of the model, with keras.layers.Normalization or "
            "before; in later layers, look for a large bias",
        )


def _non_finite_parameters(layer, record):
    parameters = {"gamma": layer.gamma, "beta": layer.beta}
    bad = {
        name: ~np.isfinite(values)
        for name, values in parameters.items()
        if values is not None and not np.isfinite(values).all()
    }
    if bad:
        which = " and ".join(f"{name} in {_of(mask)}" for name, mask in bad.items())
        return Finding(
            "non-finite-parameters",
            layer.layer,
            ERROR,
            f"Not finite: {which}; so is the output, in training too.",
            "go back to a checkpoint: no statistics can mend this",
        )


def _small_gamma(layer, record):
    if layer.gamma is None:
        return None
    small = np.abs(layer.gamma) < SMALL_GAMMA
    if small.any():
        return Finding(
            "small-gamma",
            layer.layer,
            WARNING if small.mean() > MANY else NOTE,
            f"Gamma is below {SMALL_GAMMA:g} in {_of(small)}: the output is beta.",
            "keep gamma up: train on with gamma_regularizer=None and without weight "
            "decay of gamma, or with fewer channels in the layer before it",
        )


def _frozen(layer, record):
    if layer.frozen:
        thaw = "layer.trainable = True" if layer.keras else "keras_bn.unfreeze(model)"
        return Finding(
            "frozen",
            layer.layer,
            NOTE,
            "The layer is frozen: training does not update its moving statistics.",
            thaw if layer.keras else f"{thaw}; layer.trainable = True",
            None if layer.keras else Fix("unfreeze"),
        )
    if layer.inference_mode and not record.trains:
        if layer.initial:
            return None  # a finding of the statistics says it
        return Finding(
            "frozen",
            layer.layer,
            WARNING,
            "Training does not update the moving statistics, and normalizes with "
            f"them: {_WITHOUT_TRAINING}.",
            _TAKE_TRAINING,
        )
    if layer.inference_mode:
        return Finding(
            "frozen",
            layer.layer,
            NOTE,
            "The model calls the layer with training=False: training does not update "
            "its moving statistics.",
            "call it, and the model it is in, without training=False",
        )


def _follows_inputs(layer, record):
    if layer.adapts:
        alike, batches = record.of_one_class, record.batches
        most = alike > batches / 2
        worse = f"{alike} of {batches} batches are" if most else "a batch is"
        return Finding(
            "follows-inputs",
            layer.layer,
            WARNING if most else NOTE,
            "Inference follows the inputs (keras_bn.adapt): a prediction depends on "
            f"the other samples of its batch, and is worse where {worse} of one class.",
            f"{'mix the classes in each batch, or ' * most}keras_bn.unadapt(model)",
        )


def _small_batch(layer, record):
    if not isinstance(layer, MeasuredLayer):
        return None
    if layer.elements < FEW_ELEMENTS and not (layer.frozen or layer.inference_mode):
        return Finding(
            "small-batch",
            layer.layer,
            WARNING,
            f"The statistics of a batch rest on {layer.elements:g} elements: the "
            "standard error of the variance is "
            f"{np.sqrt(2 / max(layer.elements, 1)):.0%}.",
            "a larger batch_size, synchronized=True over replicas, or renorm=True",
        )


def _redundant_bias(layer, record):
    if layer.bias_of is not None:
        return Finding(
            "redundant-bias",
            layer.layer,
            NOTE,
            f"The bias of '{layer.bias_of}' before it has no effect: the normalization "
            "subtracts it.",
            f"use_bias=False in '{layer.bias_of}'",
        )


def _non_finite_data(record):
    if record.invalid:
        return Finding(
            "non-finite-data",
            record.model,
            WARNING,
            f"{record.invalid:,} of {record.samples + record.invalid:,} samples in the "
            f"data are NaN or infinite; the first is sample {record.first_invalid}. "
            "They are left out of this report. It is the data, not the model.",
            "leave them out of training, too: one of them makes every weight NaN",
        )


def _non_finite_outputs(record):
    if not record.has_data:
        return None
    parameters = [p for layer in record.layers for p in (layer.gamma, layer.beta)]
    statistics = [
        s for layer in record.layers for s in (layer.moving_mean, layer.moving_variance)
    ]
    values = [value for value in parameters + statistics if value is not None]
    if not all(np.isfinite(value).all() for value in values):
        return None  # that is the reason
    if any((layer.moving_variance < 0).any() for layer in record.layers):
        return None
    if not np.isfinite([record.gap, *(record.loss or ())]).all():
        return Finding(
            "non-finite-parameters",
            record.model,
            ERROR,
            "The outputs or the loss are NaN or infinite on data that is finite, "
            "though the batch normalizations are not: a weight is, or a layer "
            "overflows.",
            "look for weights that are not finite, and go back to a checkpoint",
        )


def _train_inference_gap(record):
    if not record.has_data or not np.isfinite(record.gap):
        return None
    live = [
        layer for layer in record.measured if not (layer.frozen or layer.inference_mode)
    ]
    # Standard errors from n elements: 1/√n of the mean, 1/√(2n) of the deviation.
    noise = np.sqrt(sum(1.5 / max(layer.elements, 1) for layer in live))
    worse = []
    if record.loss is not None:
        inference, training = record.loss
        if inference > (LOSS_RATIO + noise) * training and np.isfinite(inference):
            worse.append(f"the loss is {inference:.3g} instead of {training:.3g}")
    if record.accuracy is not None:
        inference, training = record.accuracy
        # Standard error of the difference of two shares.
        shares = inference * (1 - inference) + training * (1 - training)
        by_chance = SIGMAS * np.sqrt(shares / record.samples)
        if inference < training - ACCURACY_LOSS - by_chance:
            worse.append(f"the accuracy is {inference:.1%} instead of {training:.1%}")
    if (
        record.loss is None
        and record.accuracy is None
        and record.gap > OUTPUT_GAP + noise
    ):
        worse.append(f"the outputs differ by {record.gap:.2g} of their spread")
    if worse:
        return Finding(
            "train-inference-gap",
            record.model,
            WARNING,
            "With the moving statistics instead of those of the batches, "
            f"{' and '.join(worse)}.",
            str(Fix("recalibrate")),
            Fix("recalibrate"),
        )


_STATISTICS = (
    _non_finite,
    _negative_variance,
    _never_updated,
    _momentum_too_slow,
    _stale,
)
_LAYER = (
    _non_finite_parameters,
    _dead_channel,
    _large_mean,
    _small_gamma,
    _frozen,
    _follows_inputs,
    _small_batch,
    _redundant_bias,
)
_MODEL = _non_finite_data, _non_finite_outputs, _train_inference_gap


def _of(which, start=False):
    """How many channels, in words."""
    channels = "channels" if which.size > 1 else "channel"
    if which.all():
        all_of = f"all {which.size} channels" if which.size > 1 else "the only channel"
        return all_of.capitalize() if start else all_of
    return f"{which.sum()} of {which.size} {channels}"
