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

from keras_bn.backends import averages
from keras_bn.backends.formulas import where
from keras_bn.backends.layout import layout_of
from keras_bn.moments import Moments


def forward(x, mask, gamma, beta, *, epsilon, plan, replicas=None):
    """Normalize a batch with its own statistics.

    Args:
        x: input, float32 or float64.
        mask, gamma, beta, epsilon, plan: see the contract of the backends.
        replicas: None; or what exchanges values with the replicas whose statistics are
            shared. `replicas.total(*values)` is a list of tensors, each added up over
            all of them, with gradients. `replicas.gather(*values)` is a list of
            tensors, each with the replicas along a new leading axis, without gradients.

    Returns:
        `(y, moments)`: the output, and the `Moments` of the batch.
    """
    layout = layout_of(x, plan)
    mask = layout.mask(mask, x)
    gamma = layout.parameter(gamma, 1.0, x.dtype)
    beta = layout.parameter(beta, 0.0, x.dtype)
    count, near = layout.count(x, mask), layout.near(x, mask)
    d = x - layout.broadcast(near)
    total = layout.sum(where(mask, ops.stop_gradient(d)))
    common = near
    if replicas is not None:
        count = count + ops.zeros_like(near)
        count, common, total = averages.common(*replicas.gather(count, near, total))
    n = ops.where(count > 0, count, ops.ones_like(count))
    shift = total / n
    d = d - layout.broadcast(shift + (common - near))
    counted = where(mask, d)
    rest, square = layout.sum(counted), layout.sum(ops.square(counted))
    if replicas is not None:
        rest, square = replicas.total(rest, square)
    rest = rest / n
    variance = ops.relu(square / n - ops.square(rest))
    scale = gamma * ops.rsqrt(variance + epsilon)
    y = _scaled(d, scale, mask, layout) + layout.broadcast(beta - rest * scale)
    moments = count, common + (shift + rest), variance
    return y, Moments(*(ops.stop_gradient(layout.statistic(m)) for m in moments))


def _scaled(d, scale, mask, layout):
    """`d * scale`. What a mask leaves out and is not finite adds nothing to any sum."""
    if mask is None:
        return d * layout.broadcast(scale)
    good = where(ops.logical_or(mask, ops.isfinite(d)), d)
    scale = layout.broadcast(scale)
    return good * scale + (d - good) * ops.stop_gradient(scale)
