"""Batch renormalization: the correction, its moving statistics and its ramp."""

from typing import Any, NamedTuple

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_bn.layer import moving
from keras_bn.layer.moving import State
from keras_bn.moments import Moments, Tensor, of_tensors

KEYS = ("rmax", "rmin", "dmax")


class Bounds(NamedTuple):
    """How far the correction may go: rmin ≤ r ≤ rmax, −dmax ≤ d ≤ dmax."""

    rmax: Tensor
    rmin: Tensor
    dmax: Tensor


def bounds(clipping: dict[str, Any] | None, updates: Tensor, dtype: str) -> Bounds:
    """The bounds after a number of updates.

    Args:
        clipping: dict with any of the keys `rmax`, `rmin`, `dmax`: floats, or
            `LearningRateSchedule`s of the update count. A missing key or None means
            unbounded.
        updates: int tensor, the number of updates so far; None without schedules.
        dtype: float dtype of the result.
    """
    unbounded = {"rmax": float("inf"), "rmin": 0.0, "dmax": float("inf")}

    clipping = clipping or {}

    def value(key):
        bound = clipping.get(key)
        bound = unbounded[key] if bound is None else bound
        if isinstance(bound, LearningRateSchedule):
            return ops.cast(bound(ops.max(updates)), dtype)
        return ops.convert_to_tensor(bound, dtype)

    return Bounds(*(value(key) for key in KEYS))


def correction(
    old: State, batch: Moments, limits: Bounds, epsilon: float
) -> tuple[Tensor, Tensor]:
    r"""The factor and offset that correct a batch to the moving statistics.

    $$r = \operatorname{clip}\frac{\sqrt{s^2+\epsilon}}{\sigma_r}, \qquad
      d = \operatorname{clip}\frac{\bar x - \mu_r}{\sigma_r}, \qquad
      y = \gamma\,(\hat x\,r + d) + \beta$$

    Args:
        old: the present `State`.
        batch: `Moments` of the batch.
        limits: the `Bounds` of r and d.
        epsilon: added to the variance; `renorm_stddev` is at least its root.

    Returns:
        `(r, d)`, one value per channel each, without gradient.

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", 2017; Keras's definition of the standard deviations.
    """
    batch = of_tensors(batch)
    stddev = ops.sqrt(batch.variance + epsilon)
    floor = ops.sqrt(ops.convert_to_tensor(epsilon, stddev.dtype))
    reference = ops.cast(old.renorm_stddev, stddev.dtype)
    # Keras's `maximum` gives float32 for float64 on PyTorch.
    reference = ops.where(reference > floor, reference, floor)
    r = stddev / reference
    d = (batch.mean - ops.cast(old.renorm_mean, stddev.dtype)) / reference
    r = ops.clip(r, limits.rmin, limits.rmax)
    d = ops.clip(d, -limits.dmax, limits.dmax)
    # Moments without elements may hold anything.
    counted = ops.convert_to_tensor(batch.count) > 0
    r = ops.where(counted, r, ops.ones_like(r))
    d = ops.where(counted, d, ops.zeros_like(d))
    return ops.stop_gradient(r), ops.stop_gradient(d)


def update(
    old: State,
    batch: Moments,
    rule: moving.Rule,
    renorm_momentum: float,
    epsilon: float,
) -> State:
    """All moving statistics after a batch.

    The moving standard deviation is updated, and the moving variance follows from it,
    as in Keras. A channel whose batch moments are not usable keeps all its statistics.

    Args:
        old: the present `State`.
        batch: `Moments` of the batch.
        rule: how the batch updates the moving mean and standard deviation.
        renorm_momentum: weight of the old value in the statistics that training is
            corrected to.
        epsilon: added to the variance under the root.

    Returns:
        The new `State`.
    """

    def deviation(variance):
        return ops.sqrt(variance + epsilon)

    new = moving.update(old._replace(variance=old.stddev), batch, rule, deviation)
    stddev = new.variance
    reference = moving.update(
        State(old.renorm_mean, old.renorm_stddev),
        batch,
        moving.Rule(renorm_momentum),
        deviation,
    )
    _, known = moving.usable_parts(batch, rule)
    variance = ops.relu(stddev * stddev - epsilon)
    return new._replace(
        variance=ops.where(known, variance, old.variance),
        stddev=stddev,
        renorm_mean=reference.mean,
        renorm_stddev=reference.variance,
    )


@keras.saving.register_keras_serializable(package="keras_bn")
class LinearRamp(LearningRateSchedule):
    """A bound that changes linearly between two update counts.

    Args:
        start: value up to `begin`.
        stop: value from `end` on.
        begin, end: update counts between which it changes.
        inverse: whether the bound is one over that value.

    Called with an update count, it returns the bound, a float32 scalar.

    >>> from keras_bn.layer.renorm import LinearRamp
    >>> ramp = LinearRamp(1.0, 3.0, begin=5000, end=40000)
    >>> [float(ramp(count)) for count in (0, 5000, 22500, 40000, 10**6)]
    [1.0, 1.0, 2.0, 3.0, 3.0]
    """

    def __init__(
        self,
        start: float,
        stop: float,
        begin: int,
        end: int,
        inverse: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= begin <= end:
            raise ValueError(
                "`begin` and `end` must be update counts with 0 <= begin <= end. "
                f"Received: begin={begin!r}, end={end!r}"
            )
        self.start, self.stop = float(start), float(stop)
        self.begin, self.end = int(begin), int(end)
        self.inverse = bool(inverse)

    def __call__(self, step: Tensor) -> Tensor:
        passed = ops.cast(step, "float32") - float(self.begin)
        share = ops.clip(passed / max(float(self.end - self.begin), 1.0), 0.0, 1.0)
        value = self.start * (1.0 - share) + self.stop * share
        return 1.0 / value if self.inverse else value

    def get_config(self) -> dict[str, float]:
        return {
            "start": self.start,
            "stop": self.stop,
            "begin": self.begin,
            "end": self.end,
            "inverse": self.inverse,
        }


def renorm_ramp(
    rmax: float = 3.0,
    dmax: float = 5.0,
    *,
    begin: int = 5_000,
    rmax_end: int = 40_000,
    dmax_end: int = 25_000,
    scale: float = 1.0,
) -> dict[str, LinearRamp]:
    """The clipping schedule of the Batch Renormalization paper.

    Training starts as plain batch normalization (r = 1, d = 0). From `begin` on, the
    bounds widen linearly: r_max from 1 to `rmax`, r_min as its inverse, and d_max from
    0 to `dmax`.

    Args:
        rmax: final r_max, at least 1.
        dmax: final d_max, at least 0.
        begin: update count at which both start to change.
        rmax_end: update count at which r_max reaches `rmax`.
        dmax_end: update count at which d_max reaches `dmax`.
        scale: factor on all three counts, for shorter or longer trainings.

    Returns:
        A dict for the argument `renorm_clipping` of `BatchNormalization`.

    Raises:
        ValueError: for bounds or counts out of range.

    Source: Ioffe, "Batch Renormalization", 2017, section 4.

    >>> import keras_bn
    >>> clipping = keras_bn.renorm_ramp(scale=0.01)
    >>> float(clipping["rmax"](50)), float(clipping["rmax"](400))
    (1.0, 3.0)
    >>> layer = keras_bn.BatchNormalization(renorm=True, renorm_clipping=clipping)
    """
    if rmax < 1:
        raise ValueError(f"`rmax` must be 1 or greater. Received: rmax={rmax!r}")
    if dmax < 0:
        raise ValueError(f"`dmax` must be 0 or greater. Received: dmax={dmax!r}")
    if not scale > 0:
        raise ValueError(f"`scale` must be greater than 0. Received: scale={scale!r}")
    begin, rmax_end, dmax_end = (
        round(count * scale) for count in (begin, rmax_end, dmax_end)
    )
    return {
        "rmax": LinearRamp(1.0, rmax, begin, rmax_end),
        "rmin": LinearRamp(1.0, rmax, begin, rmax_end, inverse=True),
        "dmax": LinearRamp(0.0, dmax, begin, dmax_end),
    }


def root_of(initializer):
    """An initializer that gives the square root of what `initializer` gives."""

    def draw(shape, dtype=None):
        return ops.sqrt(initializer(shape, dtype=dtype))

    return draw
