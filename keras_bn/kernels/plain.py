"""Two passes in plain ops: any rank, dtype, axis and mask; always right."""

from typing import Any

import tensorflow as tf

from keras_bn.kernels import dispatch, synced
from keras_bn.kernels.layout import at_least_float32, broadcast, layout_of
from keras_bn.moments import Moments


def normalize_with(x, mean, variance, gamma, beta, *, axes, epsilon):
    r"""Normalize with given statistics: inference, or a frozen layer.

    $$y = (x - \mu)\;\frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} + \beta$$

    The subtraction comes first: multiplied out, a large mean would cancel against
    itself after rounding.

    Args:
        x: input of a float dtype.
        mean, variance: statistics, one value per channel, float32 or float64.
        gamma, beta: scale and offset, one value per channel, or None.
        axes: the channel axes of `x`.
        epsilon: added to the variance, non-negative.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    wide = at_least_float32(x)

    def along(value):
        return broadcast(tf.cast(value, wide.dtype), x.shape, axes)

    scale = tf.math.rsqrt(along(variance) + epsilon)
    if gamma is not None:
        scale = along(gamma) * scale
    # `+ -`: an added constant is folded into the convolution before it by what deploys
    # models, a subtracted one is not. The bits are the same.
    y = (wide + -along(mean)) * scale
    if beta is not None:
        y += along(beta)
    return tf.cast(y, x.dtype)


def affine(x, scale, offset, *, axes):
    """`x * scale + offset`, with one value per channel each."""
    return x * broadcast(scale, x.shape, axes) + broadcast(offset, x.shape, axes)


def normalize_batch(
    x, mask, gamma, beta, *, axes, epsilon, synchronized=False, group_size=None
):
    r"""Normalize with the statistics of the batch itself.

    Forward, over the $n$ elements that count in a channel:

    $$\bar x = \tfrac1n\sum x, \quad s^2 = \tfrac1n\sum (x-\bar x)^2, \quad
      \hat x = \frac{x-\bar x}{\sqrt{s^2+\epsilon}}, \quad y = \gamma\hat x+\beta$$

    Backward, for the upstream gradient $g$:

    $$d\beta = \sum g, \quad d\gamma = \sum g\,\hat x, \quad
      dx = \frac{\gamma}{\sqrt{s^2+\epsilon}}
           \Bigl(g - \tfrac1n\,d\beta - \tfrac1n\,\hat x\,d\gamma\Bigr)$$

    The closed form keeps one tensor of the size of `x` alive between the passes, and
    is made of differentiable ops itself, so that a gradient penalty can differentiate
    it again.

    Elements that the mask leaves out are normalized like the others but belong to no
    statistic: for them $dx = \gamma g/\sqrt{s^2+\epsilon}$, and where they are not
    finite they add nothing to any sum.

    Args:
        x: input of a float dtype.
        mask: bool tensor that broadcasts to the shape of `x` without its channel
            axes, True where an element counts; or None.
        gamma, beta: scale and offset, one value per channel, or None.
        axes: the channel axes of `x`.
        epsilon: added to the variance, non-negative.
        synchronized: whether the statistics are those of all replicas together.
        group_size: size of the groups that the batch is cut into, each normalized by
            itself; None for the batch as one.

    Returns:
        `(y, Moments)`: the output, of the shape and dtype of `x`, and the moments of
        the batch in float32 at least; of each group, along one more leading axis,
        when it is cut. The moments are constants to differentiation.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    xla = dispatch.in_xla()
    layout = layout_of(x, axes, group_size)
    wide = at_least_float32(x).dtype
    counted = layout.mask(mask, x)
    count = layout.count(counted, x, wide)
    synchronized = synchronized and synced.active()
    moments: Any = None

    def average(x, mean=layout.mean):
        """The mean over what counts in each channel."""
        if counted is None and group_size is None:
            return mean(x)
        return layout.sum(_where(counted, x)) / tf.maximum(count, 1)

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        # The moments leave on their own: a custom gradient ties its results into one
        # node, and where a weight's update hung on the moments, the optimizer of
        # graphs took the way from y to it for an order in time, then cut the knot.
        nonlocal moments
        dtype, x = x.dtype, tf.cast(x, wide)
        # The mean comes in two parts, `first + rest`: what the sum of large numbers
        # lost to rounding is found again among the small differences.
        first = average(x, layout.near_mean)
        centred = x - layout.spread(first)
        # To sum them, XLA would write down differences that have another use besides.
        rest = -average(layout.spread(first) - x) if xla else average(centred)
        centred -= layout.spread(rest)
        variance = average(tf.square(centred))
        moments = Moments(count, first, variance)
        if synchronized:
            moments, rest = synced.merge(moments, rest)
            centred = (x - moments.mean) - rest
        moments = moments._replace(mean=moments.mean + rest)
        n = tf.maximum(moments.count, 1)

        rstd = tf.math.rsqrt(moments.variance + epsilon)
        scale = gamma * rstd
        y = centred * layout.spread(scale) + beta
        if xla:
            y = _once(y, x)

        def gradient(upstream):
            g = tf.cast(upstream, wide)
            finite = centred
            if counted is not None:
                finite = _where(counted | tf.math.is_finite(centred), centred)
            sum_g, sum_gx = layout.sum(g), layout.sum(g * finite)
            # In an empty batch rstd is NaN and the sum 0.
            normalized = tf.math.multiply_no_nan
            d_gamma = layout.total(normalized(rstd, sum_gx))
            d_beta = layout.total(sum_g)
            if synchronized:
                sum_g, sum_gx = synced.total(sum_g, sum_gx)
            share = scale / n
            slope = normalized(rstd, sum_gx) * (rstd * share)
            through = finite * layout.spread(slope) + layout.spread(sum_g * share)
            dx = layout.spread(scale) * g - _where(counted, through)
            if xla:
                dx = _once(dx, g)
            return tf.cast(dx, dtype), d_gamma, d_beta

        return tf.cast(y, dtype), gradient

    gamma = layout.parameter(1.0 if gamma is None else gamma, wide)
    beta = layout.parameter(0.0 if beta is None else beta, wide)
    y = normalize(layout.inner(x), gamma, beta)
    moments = Moments(*(layout.statistic(tf.stop_gradient(m)) for m in moments))
    return layout.outer(y, x), moments


def _once(value, operand):
    """`value`, for XLA on a CPU to compute once.

    Otherwise it computes it anew in each of its uses and, in a chain of layers, in all
    of theirs; but not what has several operands of full size.

    Args:
        value: a tensor that is NaN wherever `operand` is.
        operand: a tensor of the same shape.
    """
    return tf.where(operand == operand, value, operand)


def _where(mask, value):
    """`value` where the mask counts it, else 0 (a product would keep NaN)."""
    return value if mask is None else tf.where(mask, value, tf.zeros_like(value))
