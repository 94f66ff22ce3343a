r"""Batch normalization in closed form, in `keras.ops`: right for any input.

Everything is computed from $d = x - s$, where the shift $s$ is one value per channel,
near the channel's mean. Batch normalization does not change when its input is shifted,
and sums of small numbers lose no digits where the mean is large.

Forward, over the $n$ elements that count in a channel:

$$\mu = \tfrac1n\sum d, \quad \sigma^2 = \tfrac1n\sum (d-\mu)^2, \quad
  \hat x = \frac{d-\mu}{\sqrt{\sigma^2+\epsilon}}, \quad y = \gamma\hat x+\beta$$

Backward, for the upstream gradient $g$:

$$d\beta = \sum g, \quad d\gamma = \sum g\,\hat x, \quad
  dx = \frac{\gamma}{\sqrt{\sigma^2+\epsilon}}
       \Bigl(g - \tfrac1n\,d\beta - \tfrac1n\,\hat x\,d\gamma\Bigr)$$

Of the size of the input, only $d-\mu$ is kept for the backward pass. Both passes
consist of differentiable operations: a gradient penalty can differentiate them again.

Elements that a mask leaves out are normalized like the others but belong to no
statistic: for them $dx = \gamma g/\sqrt{\sigma^2+\epsilon}$. Where they are not finite,
they add nothing to any sum.

Source: Ioffe and Szegedy, "Batch Normalization", 2015.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_bn.moments import Moments, Tensor


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass.

    Args:
        centred: the input less its mean.
        variance: the variance, one value per channel.
        gamma: the scale.
        count: how many elements each statistic rests on, 1 at least.
        mask: bools that broadcast to the input, true where an element counts; or None.
    """

    centred: Any
    variance: Any
    gamma: Any
    count: Any
    mask: Any = None


def forward(x, mask, gamma, beta, *, epsilon, layout, merge=None):
    """Normalize a batch with its own statistics.

    Args:
        x: input, float32 or float64.
        mask: bools that broadcast to the input, true where an element counts; or None.
        gamma, beta: scale and offset, in the inner shape of the layout.
        epsilon: added to the variance, non-negative.
        layout: the `Layout` of the input.
        merge: None; or a function that takes the `Moments` of this replica about its
            value near the mean, and that value; and returns those of all replicas
            likewise.

    Returns:
        `(y, moments, saved)`: the output, the `Moments` of the batch, and `Saved`.
    """
    near, rest, shifted = layout.shifted(x, mask)
    count = layout.count(x, mask)
    mean, variance, centred = statistics(shifted, mask, ops.maximum(count, 1), layout)
    mean = beyond(rest, mean)
    if merge is not None:
        (count, mean, variance), near = merge(Moments(count, mean, variance), near)
        centred = (x - layout.broadcast(near)) - layout.broadcast(mean)
    saved = Saved(centred, variance, gamma, ops.maximum(count, 1), mask)
    y = normalize(saved, beta, epsilon=epsilon, layout=layout)
    return y, Moments(count, near + mean, variance), saved


def beyond(rest, mean):
    """How far a mean is from `near`, given the other values of `Layout.shifted`.

    Args:
        rest: the second part of the shift; None where it has one part alone.
        mean: the mean of the input less the shift.
    """
    return mean if rest is None else rest + mean


def statistics(shifted, mask, count, layout):
    """Mean and variance of the elements that count, and the input less the mean.

    Args:
        shifted: the input less the shift.
        mask, layout: as for `forward`.
        count: how many elements each statistic rests on, 1 at least.
    """
    mean = layout.sum(where(mask, shifted)) / count
    centred = shifted - layout.broadcast(mean)
    variance = layout.sum(where(mask, ops.square(centred))) / count
    return mean, variance, centred


def normalize(saved: Saved, beta, *, epsilon, layout):
    """The output, from the input less its mean."""
    scale = saved.gamma * ops.rsqrt(saved.variance + epsilon)
    return saved.centred * layout.broadcast(scale) + beta


def backward(saved: Saved, upstream, *, epsilon, layout, total=None):
    """The gradients of a batch normalized with its own statistics.

    Args:
        saved: what `forward` returned.
        upstream: gradient with respect to the output.
        epsilon, layout: as for `forward`.
        total: None; or a function that sums each of several tensors over all replicas.

    Returns:
        `(dx, d_gamma, d_beta)`, in the shapes of the input and of gamma.
    """
    centred, variance, gamma, count, mask = saved
    if mask is not None:
        centred = where(ops.logical_or(mask, ops.isfinite(centred)), centred)
    rstd = ops.rsqrt(variance + epsilon)
    sum_g = layout.sum(upstream)
    sum_gx = layout.sum(upstream * centred) * rstd
    d_gamma, d_beta = layout.total(sum_gx), layout.total(sum_g)
    if total is not None:
        sum_g, sum_gx = total(sum_g, sum_gx)
    scale = gamma * rstd
    share = scale / count
    through = centred * layout.broadcast(sum_gx * rstd * share)
    through += layout.broadcast(sum_g * share)
    return upstream * layout.broadcast(scale) - where(mask, through), d_gamma, d_beta


def where(mask, value):
    """`value` where the mask is true, else 0 (a product would keep NaN)."""
    return value if mask is None else ops.where(mask, value, ops.zeros_like(value))


def prevent_refusion(value: Tensor, operand: Tensor) -> Tensor:
    """`value`, in a form that XLA on a CPU computes only once.

    XLA would fuse it into each of its uses and compute it anew there, again and again
    in a chain of layers. It does not do so with an op of several operands of full size.

    Args:
        value, operand: tensors of one shape, the first NaN wherever the second is.
    """
    return ops.where(operand == operand, value, operand)
