r"""Batch normalization in a form that a backend differentiates by itself.

JAX and PyTorch derive from it the closed form of `formulas`, in as few passes, with
second derivatives and, on JAX, in forward mode too.

The mean $s$ of the input is a constant to differentiation: batch normalization does not
change when its input is shifted. From $d = x - s$ and two sums over the $n$ elements
that count in a channel follows all the rest. What rounding left out of $s$ is $\rho$,
so small that nothing cancels in the variance:

$$\rho = \tfrac1n\sum d, \quad \sigma^2 = \tfrac1n\sum d^2 - \rho^2, \quad
  k = \frac{\gamma}{\sqrt{\sigma^2+\epsilon}}, \quad y = k\,d + (\beta - k\,\rho)$$
"""

from keras import ops

from keras_bn.backends.formulas import where
from keras_bn.backends.layout import layout_of
from keras_bn.moments import Moments


def forward(x, mask, gamma, beta, *, epsilon, plan, total=None):
    """Normalize a batch with its own statistics.

    Args:
        x: input, float32 or float64.
        mask, gamma, beta, epsilon, plan: see the contract of the backends.
        total: None; or a function that sums each of several tensors over all replicas.

    Returns:
        `(y, moments)`: the output, and the `Moments` of the batch.
    """
    layout = layout_of(x, plan)
    mask = layout.mask(mask, x)
    gamma = layout.parameter(gamma, 1.0, x.dtype)
    beta = layout.parameter(beta, 0.0, x.dtype)
    count = layout.count(x, mask)
    shift = layout.sum(where(mask, ops.stop_gradient(x)))
    if total is not None:
        count, shift = total(count, shift)
    n = ops.where(count > 0, count, ops.ones_like(count))
    shift = shift / n
    d = x - layout.spread(shift)
    counted = where(mask, d)
    rest, square = layout.sum(counted), layout.sum(ops.square(counted))
    if total is not None:
        rest, square = total(rest, square)
    rest = rest / n
    variance = ops.relu(square / n - ops.square(rest))
    scale = gamma * ops.rsqrt(variance + epsilon)
    y = _scaled(d, scale, mask, layout) + layout.spread(beta - rest * scale)
    moments = count, shift + rest, variance
    return y, Moments(*(ops.stop_gradient(layout.statistic(m)) for m in moments))


def _scaled(d, scale, mask, layout):
    """`d * scale`. What a mask leaves out and is not finite adds nothing to any sum."""
    if mask is None:
        return d * layout.spread(scale)
    good = where(ops.logical_or(mask, ops.isfinite(d)), d)
    scale = layout.spread(scale)
    return good * scale + (d - good) * ops.stop_gradient(scale)
