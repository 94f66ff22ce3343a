"""One training step and one inference, as functions of tensors."""

from typing import NamedTuple

from keras import ops

from keras_bn.backends import backend
from keras_bn.backends.layout import broadcast
from keras_bn.backends.plan import Plan
from keras_bn.layer import moving, renorm
from keras_bn.layer.moving import State as State
from keras_bn.moments import Moments, Tensor, at_least_float32


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


@backend.compiled
def train(
    x: Tensor,
    mask: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: State,
    bounds: renorm.Bounds | None = None,
    momentum: Tensor | None = None,
    *,
    settings: Settings,
    plan: Plan,
) -> tuple[Tensor, State]:
    """One training step.

    Args:
        x: input of a float dtype.
        mask: bools that broadcast to `x`, true where an element counts; or None.
        gamma, beta: scale and offset, one value per channel, or None.
        state: the present `State`.
        bounds: `renorm.Bounds` where there is renormalization, else None.
        momentum: that of this step, where it follows a schedule, else None.
        settings: the `Settings`.
        plan: the `Plan` for the input.

    Returns:
        `(y, state)`: the output, of the shape of `x`, and the new `State`.
    """
    if bounds is not None:
        # The correction is computed on the output: not in half precision.
        x = ops.cast(x, at_least_float32(x.dtype))
    epsilon, rule = settings.epsilon, settings.rule
    if momentum is not None:
        rule = rule._replace(momentum=momentum)
    y, batch = backend.forward(x, mask, gamma, beta, epsilon=epsilon, plan=plan)
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
    if backend.replicated() and not settings.synchronized:
        new = _average(state, new, batch, rule)
    return y, new


def _average(old: State, new: State, batch: Moments, rule: moving.Rule) -> State:
    """Average the replicas' updates, so that all end with the same state."""
    mean, variance = moving.usable_parts(batch, rule)
    if len(mean.shape) > len(old.mean.shape):
        mean, variance = ops.any(mean, axis=0), ops.any(variance, axis=0)
    updated = State(
        mean=mean,
        variance=variance,
        updates=ops.stack([mean, variance]),
        stddev=variance,
        renorm_mean=mean,
        renorm_stddev=mean,
    )
    return State(*backend.average_updates(old, new, updated))


@backend.compiled
def normalize(
    x: Tensor,
    mask: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    settings: Settings,
    plan: Plan,
) -> tuple[Tensor, Moments]:
    """The output under the batch's own statistics, and these as `Moments`."""
    return backend.forward(x, mask, gamma, beta, epsilon=settings.epsilon, plan=plan)


@backend.compiled
def infer(
    x: Tensor, gamma: Tensor, beta: Tensor, state: State, *, settings: Settings
) -> Tensor:
    r"""The output under the moving statistics.

    With the scale $s = \gamma / \sqrt{\sigma^2 + \epsilon}$, it is
    $x s + (\beta - \mu s)$ on TensorFlow and JAX, as Keras's layer rounds there, and
    $s\,(x - \mu) + \beta$ on PyTorch.
    """
    return _standardized(x, gamma, beta, state, settings)


@backend.compiled
def adapt(
    x: Tensor,
    mask: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: State,
    *,
    prior: float | None,
    memory: float | None,
    settings: Settings,
    plan: Plan,
) -> tuple[Tensor, State]:
    r"""The output under statistics pooled with those of the present batch.

    With the share $a$ of the batch, its mean $m$ and variance $v$:

    $$\mu' = \mu + a\,(m - \mu), \qquad
      \sigma'^2 = (1-a)\,\sigma^2 + a\,v + a\,(1-a)\,(m - \mu)^2$$

    A channel whose batch statistics are not finite, or rest on nothing, has $a = 0$.
    The statistics are constants to differentiation.

    Args:
        x, mask, gamma, beta, settings, plan: as for `train`.
        state: the statistics to start from.
        prior: how many samples they count for: $a = n / (n + prior)$ for a batch of
            $n$ samples; None if there is a `memory`.
        memory: their weight, $a = 1 - memory$; or None.

    Returns:
        `(y, state)`: the output, and the pooled statistics.

    Source: Schneider et al., "Improving robustness against common corruptions by
    covariate shift adaptation", 2020.
    """
    batch = backend.moments(x, mask, epsilon=settings.epsilon, plan=plan)
    dtype = state.mean.dtype
    m, v = (ops.cast(value, dtype) for value in (batch.mean, batch.variance))
    usable = ops.isfinite(m) & ops.isfinite(v) & (batch.count > 0)
    if memory is None:
        samples = ops.cast(ops.shape(x)[0], dtype)
        share = samples / ops.maximum(samples + prior, 1)
    else:
        share = ops.convert_to_tensor(1.0 - memory, dtype)
    distance = m - state.mean
    mean = state.mean + share * distance
    variance = (1.0 - share) * state.variance + share * v
    variance = variance + share * (1.0 - share) * ops.square(distance)
    if prior == 0:
        mean, variance = m, v  # whatever the moving statistics are
    pooled = state._replace(
        mean=ops.where(usable, mean, state.mean),
        variance=ops.where(usable, variance, state.variance),
    )
    return _standardized(x, gamma, beta, pooled, settings, plan), pooled


def _standardized(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    state: State,
    settings: Settings,
    plan: Plan | None = None,
) -> Tensor:
    """The output under given statistics; with a plan, by its kernel."""
    dtype = at_least_float32(x.dtype)
    scale = _scale(gamma, state, settings.epsilon, dtype)
    mean = ops.cast(state.mean, dtype)
    beta = ops.zeros_like(mean) if beta is None else ops.cast(beta, dtype)
    mean, scale, beta = (
        broadcast(value, x.shape, settings.axes) for value in (mean, scale, beta)
    )
    y = backend.standardize(ops.cast(x, dtype), mean, scale, beta, plan)
    return ops.cast(y, x.dtype)


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
    scale, offset = (broadcast(value, x.shape, axes) for value in (scale, offset))
    return x * scale + offset
