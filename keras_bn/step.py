"""One training step and one inference, as functions of tensors."""

from typing import NamedTuple

from keras import ops

from keras_bn import kernels, moving, renorm
from keras_bn.moments import Moments, Tensor, wide
from keras_bn.moving import State as State


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


@kernels.compiled
def train(
    x: Tensor,
    mask: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: State,
    bounds: renorm.Bounds | None = None,
    *,
    settings: Settings,
    plan: kernels.Plan,
) -> tuple[Tensor, State]:
    """One training step.

    Args:
        x: input of a float dtype.
        mask: bools that broadcast to `x`, true where an element counts; or None.
        gamma, beta: scale and offset, one value per channel, or None.
        state: the present `State`.
        bounds: `renorm.Bounds` where there is renormalization, else None.
        settings: the `Settings`.
        plan: the `Plan` for the input; `kernels.compiled` makes it.

    Returns:
        `(y, state)`: the output, of the shape of `x`, and the new `State`.
    """
    if bounds is not None:
        # The correction is computed on the output: not in half precision.
        x = ops.cast(x, wide(x.dtype))
    epsilon, rule = settings.epsilon, settings.rule
    y, batch = kernels.forward(x, mask, gamma, beta, epsilon=epsilon, plan=plan)
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
    if kernels.replicated() and not settings.synchronized:
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
    return State(*kernels.agree(old, new, taken))


@kernels.compiled
def normalize(
    x: Tensor,
    mask: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    settings: Settings,
    plan: kernels.Plan,
) -> tuple[Tensor, Moments]:
    """The output under the batch's own statistics, and these as `Moments`."""
    return kernels.forward(x, mask, gamma, beta, epsilon=settings.epsilon, plan=plan)


@kernels.compiled
def infer(
    x: Tensor,
    mask: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: State,
    *,
    settings: Settings,
    plan: kernels.Plan,
) -> Tensor:
    r"""The output under the moving statistics; the mask is not used.

    $$y = x \cdot s + (\beta - \mu s), \qquad
      s = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}$$

    Two operations of full size, in the order of Keras's layer.
    """
    dtype = wide(x.dtype)
    mean = ops.cast(state.mean, dtype)
    scale = ops.rsqrt(ops.cast(state.variance, dtype) + settings.epsilon)
    if gamma is not None:
        scale = scale * ops.cast(gamma, dtype)
    offset = -mean * scale if beta is None else ops.cast(beta, dtype) - mean * scale
    return ops.cast(affine(ops.cast(x, dtype), scale, offset, settings.axes), x.dtype)


def affine(x: Tensor, scale: Tensor, offset: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`x * scale + offset`, with one value per channel each."""
    scale, offset = (kernels.broadcast(v, x.shape, axes) for v in (scale, offset))
    return x * scale + offset
