"""Normalizing a batch with its own statistics."""

import jax
import jax.numpy as jnp

from keras_bn.kernels import autodiff, layout
from keras_bn.kernels.jax import closed
from keras_bn.kernels.plan import Plan
from keras_bn.moments import Moments, Tensor


def forward(
    x, mask, gamma, beta, *, epsilon: float, plan: Plan
) -> tuple[Tensor, Moments]:
    """Normalize a batch with its own statistics; see the contract of the kernels."""
    # Sums overflow or lose digits in half precision.
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    if plan.group_size is None:
        lay = layout.Layout(wide, plan.axes)
    else:
        lay = layout.Grouped(wide, plan.axes, plan.group_size)
    gamma = lay.parameter(gamma, 1.0, wide.dtype)
    beta = lay.parameter(beta, 0.0, wide.dtype)
    if plan.kernel == "closed":
        rows = tuple(i for i in range(x.ndim) if i not in plan.axes)
        y, *statistics = closed.normalize(wide, gamma, beta, epsilon, rows)
        moments = Moments(lay.count(wide, None), *statistics)
    else:
        mask = lay.mask(mask, wide)
        how = {"epsilon": epsilon, "layout": lay}
        y, moments = autodiff.forward(wide, mask, gamma, beta, **how)
    moments = Moments(*(jax.lax.stop_gradient(lay.statistic(v)) for v in moments))
    return y.astype(x.dtype), moments


def standardize(x, mean, scale, beta):
    """`scale * (x - mean) + beta`; see the contract of the kernels."""
    return x * scale + (beta - mean * scale)
