"""Normalizing a batch with its own statistics."""

import jax.numpy as jnp

from keras_bn.backends import autodiff
from keras_bn.backends.jax import closed
from keras_bn.backends.jax.replicas import mapped
from keras_bn.backends.plan import Plan
from keras_bn.moments import Moments, Tensor


def forward(
    x: Tensor,
    mask: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    epsilon: float,
    plan: Plan,
) -> tuple[Tensor, Moments]:
    """Normalize a batch with its own statistics; see the contract of the backends."""
    # Sums overflow or lose digits in half precision.
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    if plan.kernel == "closed":
        y, moments = closed.forward(wide, gamma, beta, epsilon, plan.axes)
    else:
        replicas = mapped() if plan.synchronized else None
        y, moments = autodiff.forward(
            wide, mask, gamma, beta, epsilon=epsilon, plan=plan, replicas=replicas
        )
    return y.astype(x.dtype), moments


def moments(x: Tensor, mask: Tensor | None, *, epsilon: float, plan: Plan) -> Moments:
    """The moments of a batch; see the contract of the backends."""
    return forward(x, mask, None, None, epsilon=epsilon, plan=plan)[1]


def standardize(
    x: Tensor, mean: Tensor, scale: Tensor, beta: Tensor, plan: Plan | None = None
) -> Tensor:
    """`x * scale + (beta - mean * scale)`; see the contract of the backends."""
    return x * scale + (beta - mean * scale)
