"""One training step and one inference, as functions of tensors."""

from typing import NamedTuple

from keras import ops

from keras_bn import backends
from keras_bn.layer import moving, renorm
from keras_bn.layer.moving import State as State
from keras_bn.moments import Moments, Tensor, wide


class Settings(NamedTuple):
    """What a step depends on besides tensors.

    Args:
        axes: the channel axes, non-negative and ascending.
        epsilon: added to the variance.
        rule: how a batch updates the moving statistics.
        renorm_momentum: weight of the old value in the statistics of renormalization.
        synchronized: whether replicas share the statistics of the batch.
        group_size: size of ghost batches, or None.
    """

    axes: tuple[int, ...]
    epsilon: float
    rule: moving.Rule = moving.Rule()
    renorm_momentum: float = 0.99
    synchronized: bool = False
    group_size: int | None = None


@backends.compiled
def train(
    x: Tensor,
    mask: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: State,
    bounds: renorm.Bounds | None = None,
    *,
    settings: Settings,
    plan: backends.Plan,
) -> tuple[Tensor, State]:
    """One training step.

    Args:
        x: input of a float dtype.
        mask: bools that broadcast to `x`, true where an element counts; or None.
        gamma, beta: scale and offset, one value per channel, or None.
        state: the present `State`.
        bounds: `renorm.Bounds` where there is renormalization, else None.
        settings: the `Settings`.
        plan: the `Plan` for the input; `backends.compiled` makes it.

    Returns:
        `(y, state)`: the output, of the shape of `x`, and the new `State`.
    """
    if bounds is not None:
        # The correction is computed on the output: not in half precision.
        x = ops.cast(x, wide(x.dtype))
    epsilon, rule = settings.epsilon, settings.rule
    y, batch = backends.forward(x, mask, gamma, beta, epsilon=epsilon, plan=plan)
    if bounds is None:
        new = moving.update(state, batch, rule)
    else:
        r, d = renorm.correction(state, batch, bounds, epsilon)
        # gamma (x̂ r + d) + beta, from y = gamma x̂ + beta: at r = 1 and d = 0 it is y
        # itself, to the bit.
        offset = d if gamma is None else gamma * d
        if beta is not None:
            offset += beta * (1.0 - r)
        y = affine(y, r, offset, settings.axes)
        new = renorm.update(state, batch, rule, settings.renorm_momentum, epsilon)
    if backends.replicated() and not settings.synchronized:
        new = _agreed(state, new, batch, rule)
    return y, new


def _agreed(old: State, new: State, batch: Moments, rule: moving.Rule) -> State:
    """Average the replicas' steps, so that all end with the same state."""
    mean, variance = moving.usable_parts(batch, rule)
    if len(mean.shape) > len(old.mean.shape):
        mean, variance = ops.any(mean, axis=0), ops.any(variance, axis=0)
    taken = State(
        mean=mean,
        variance=variance,
        updates=ops.stack([mean, variance]),
        stddev=variance,
        renorm_mean=mean,
        renorm_stddev=mean,
    )
    return State(*backends.agree(old, new, taken))


@backends.compiled
def normalize(
    x: Tensor,
    mask: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    settings: Settings,
    plan: backends.Plan,
) -> tuple[Tensor, Moments]:
    """The output under the batch's own statistics, and these as `Moments`."""
    return backends.forward(x, mask, gamma, beta, epsilon=settings.epsilon, plan=plan)


@backends.compiled
def infer(
    x: Tensor,
    mask: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: State,
    *,
    settings: Settings,
    plan: backends.Plan,
) -> Tensor:
    r"""The output under the moving statistics; the mask is not used.

    $$y = s\,(x - \mu) + \beta, \qquad s = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}$$
    """
    given, dtype = x.dtype, wide(x.dtype)
    scale = _scale(gamma, state, settings.epsilon, dtype)
    mean = ops.cast(state.mean, dtype)
    beta = ops.zeros_like(mean) if beta is None else ops.cast(beta, dtype)
    x, statistics = ops.cast(x, dtype), (mean, scale, beta)
    spread = (backends.broadcast(v, x.shape, settings.axes) for v in statistics)
    return ops.cast(backends.standardize(x, *spread), given)


def scale_and_offset(
    gamma: Tensor, beta: Tensor, state: State, epsilon: float, dtype: str
) -> tuple[Tensor, Tensor]:
    """What the moving statistics make of the input: `x * scale + offset`."""
    scale = _scale(gamma, state, epsilon, dtype)
    mean = ops.cast(state.mean, dtype)
    offset = -mean * scale if beta is None else ops.cast(beta, dtype) - mean * scale
    return scale, offset


def _scale(gamma: Tensor, state: State, epsilon: float, dtype: str) -> Tensor:
    scale = ops.rsqrt(ops.cast(state.variance, dtype) + epsilon)
    if gamma is not None:
        scale = scale * ops.cast(gamma, dtype)
    return scale


def affine(x: Tensor, scale: Tensor, offset: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`x * scale + offset`, with one value per channel each."""
    scale, offset = (backends.broadcast(v, x.shape, axes) for v in (scale, offset))
    return x * scale + offset
