"""How the Moments of a batch update the moving statistics."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_bn.backends import backend
from keras_bn.moments import Moments, Tensor, of_tensors, to_tensor


class Rule(NamedTuple):
    """What one update does.

    Args:
        momentum: weight of the old value, in [0, 1], a float or a scalar tensor; None
            for the plain mean over all batches.
        debias: whether the first update replaces the initial values.
        unbiased: whether the moving variance averages `count / (count - 1)` times the
            population variance.
    """

    momentum: Any = 0.99
    debias: bool = False
    unbiased: bool = False

    @property
    def counts(self) -> bool:
        """Whether the rule needs to know how many updates came before."""
        return self.debias or self.momentum is None


class State(NamedTuple):
    """Everything that a training step may change, one value per channel each.

    Args:
        mean: the moving mean.
        variance: the moving variance.
        updates: how many updates the mean and the variance have had, of shape
            `(2, *mean.shape)`; None if they are not counted. Each channel has its own
            count, because a bad batch may skip one channel and not another.
        stddev: moving standard deviation, for renormalization, or None.
        renorm_mean: the mean that renormalization corrects to, or None.
        renorm_stddev: the standard deviation that it corrects to, or None.
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor = None
    stddev: Tensor = None
    renorm_mean: Tensor = None
    renorm_stddev: Tensor = None


def update(
    old: State,
    batch: Moments,
    rule: Rule,
    statistic: Callable[[Tensor], Tensor] = lambda variance: variance,
) -> State:
    r"""Moving statistics after a batch, or after several groups of it in order.

    $$\mu \leftarrow m\,\mu + (1-m)\,\bar x, \qquad
      \sigma^2 \leftarrow m\,\sigma^2 + (1-m)\,s^2$$

    With `debias`, $1-m$ is replaced by $(1-m)/(1-m^t)$ at update $t$, which makes the
    statistics the weighted mean of the batches alone; with `momentum=None`, by $1/t$.

    A channel whose batch moments are not finite, or rest on no element, keeps its old
    values to the bit: one bad batch must not ruin a trained model. So does the moving
    variance of a channel with a single element, if the rule is `unbiased`.

    Args:
        old: the present `State`.
        batch: `Moments` of the batch, in any float dtype; or of the groups it was cut
            into, along one more leading axis: the result is then that of one update
            per group, in closed form.
        rule: the `Rule` of the update.
        statistic: function of the batch's variance that gives what the second one
            averages; by default, the variance itself.

    Returns:
        The `State` with new mean, variance and updates, in the dtypes of the old ones.

    Source: Ioffe and Szegedy, 2015; Keras's `momentum`, which is 1 − PyTorch's. The
    debiased weights: Kingma and Ba, "Adam", 2015, section 3.

    >>> import numpy as np
    >>> batch = Moments(8.0, np.array([1.0, np.nan]), np.array([4.0, 4.0]))
    >>> new = update(State(np.zeros(2), np.ones(2)), batch, Rule(momentum=0.5))
    >>> print(new.mean.numpy(), new.variance.numpy())
    [0.5 0. ] [2.5 1. ]
    """
    batch = of_tensors(batch)
    usable, known = usable_parts(batch, rule)
    batch = batch.unbiased() if rule.unbiased else batch
    updates = (None, None) if old.updates is None else old.updates
    mean, mean_updates = advance(old.mean, batch.mean, usable, updates[0], rule)
    variance, variance_updates = advance(
        old.variance, statistic(batch.variance), known, updates[1], rule
    )
    new = old._replace(mean=mean, variance=variance)
    if old.updates is None:
        return new
    return new._replace(updates=ops.stack([mean_updates, variance_updates]))


def usable_parts(batch: Moments, rule: Rule) -> tuple[Tensor, Tensor]:
    """Per channel, whether the batch's mean and its variance may be used.

    Args:
        batch: `Moments` of the batch.
        rule: the `Rule` of the update.

    Returns:
        Two bool tensors of the shape of `batch.mean`.
    """
    finite = ops.isfinite(batch.mean + batch.variance)
    if isinstance(batch.count, int) and batch.count > 1:
        return finite, finite
    mean = ops.logical_and(finite, batch.count > 0)
    return mean, ops.logical_and(mean, batch.count > 1) if rule.unbiased else mean


def advance(
    old: Tensor, new: Tensor, usable: Tensor, updates: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """One moving statistic and its update count, after one new value or several.

    Args:
        old: the present values, of shape `(channels,)`, usually.
        new: the new values: of the shape of `old`, or with a leading axis of several
            values that come in order.
        usable: bools of the shape of `new`; values where it is False are skipped.
        updates: how many updates came before, of the shape of `old`; None if not
            counted.
        rule: the `Rule` of the update.

    Returns:
        `(values, updates)`, of the shapes and dtypes of `old` and `updates`.
    """
    old = to_tensor(old)
    dtype = old.dtype
    new = new if new.dtype == dtype else ops.cast(new, dtype)
    # In the plain mean all values have the same weight, as with a momentum of 1.
    momentum = 1.0 if rule.momentum is None else rule.momentum
    if not isinstance(momentum, float | int):
        momentum = ops.cast(momentum, dtype)
    several = len(new.shape) > len(old.shape)
    if not several and updates is None:
        return backend.blend(old, new, usable, momentum), updates
    new = ops.where(usable, new, ops.zeros((), dtype))
    counted = ops.cast(usable, dtype)
    total = ops.sum(counted, axis=0) if several else counted
    # How many usable values follow each new one.
    later = total - ops.cumsum(counted, axis=0) if several else None

    if rule.counts:
        before = ops.cast(updates, dtype)
        after = before + total
        whole = _geometric_sum(momentum, ops.where(after > 1, after, 1.0))
        newest = 1.0 / whole
        older = _geometric_sum(momentum, before) / whole
    else:
        newest, older = 1.0 - momentum, 1.0
    if several:
        # Each value that follows takes some weight from those before it.
        addend = ops.sum(newest * _power(momentum, later) * new, axis=0)
        value = old * (older * _power(momentum, total)) + addend
    else:
        value = old * (older * momentum) + newest * new
    if updates is not None:
        updates = ops.convert_to_tensor(updates)
        updates = updates + ops.cast(total, updates.dtype)
    return ops.where(total > 0, value, old), updates


def _geometric_sum(momentum: float, t: Tensor) -> Tensor:
    """1 + m + ... + m^(t−1), the weight of `t` values of which the newest has 1.

    By expm1, so that nothing cancels at momenta near 1, and one value has weight 1.
    """
    if momentum == 1.0:
        return t
    if momentum == 0.0:
        return ops.where(t < 1, t, 1.0)
    log = ops.convert_to_tensor(math.log(momentum), t.dtype)
    return ops.expm1(log * t) / ops.expm1(log)


def _power(momentum: Any, exponent: Tensor) -> Tensor:
    """m^exponent."""
    return ops.power(ops.convert_to_tensor(momentum, exponent.dtype), exponent)
