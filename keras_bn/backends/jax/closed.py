"""The closed form with a gradient of its own, for a batch without a mask.

`autodiff` says what is computed. XLA on a CPU would compute a tensor anew wherever it
is used, again and again in a chain of layers: hence `prevent_refusion`, in the backward
pass too, where JAX's own differentiation cannot have it. The price is forward mode:
`jax.jvp` needs `autodiff`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from keras_bn.backends.formulas import prevent_refusion
from keras_bn.backends.layout import Layout
from keras_bn.moments import Moments


def forward(x, gamma, beta, epsilon, axes):
    """Normalize a batch with its own statistics; see the contract of the backends."""
    lay = Layout(x, axes)
    gamma, beta = lay.parameter(gamma, 1.0, x.dtype), lay.parameter(beta, 0.0, x.dtype)
    rows = tuple(i for i in range(x.ndim) if i not in axes)
    y, *statistics = normalize(x, gamma, beta, epsilon, rows)
    moments = lay.count(x, None), *statistics
    return y, Moments(*(jax.lax.stop_gradient(lay.statistic(m)) for m in moments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x, gamma, beta, epsilon, rows):
    """Normalize a batch with its own statistics.

    Args:
        x: input, float32 or float64, not empty.
        gamma, beta: scale and offset, in a shape that broadcasts against it.
        epsilon: added to the variance, non-negative.
        rows: the axes to take statistics over, a tuple.

    Returns:
        `(y, mean, variance)`, the statistics without gradient, in the shape of gamma.
    """
    return _forward(x, gamma, beta, epsilon, rows)[0]


def _forward(x, gamma, beta, epsilon, rows):
    mean = _means(rows, gamma)
    shift = jax.lax.stop_gradient(mean(x))
    d = x - shift
    rest = mean(d)
    variance = jax.nn.relu(mean(d * d) - rest * rest)
    scale = gamma * jax.lax.rsqrt(variance + epsilon)
    y = prevent_refusion(d * scale + (beta - rest * scale), x)
    return (y, shift + rest, variance), (d, rest, variance, gamma)


def _backward(epsilon, rows, saved, upstreams):
    d, rest, variance, gamma = saved
    upstream, *_ = upstreams
    mean = _means(rows, gamma)
    n = math.prod(d.shape[i] for i in rows)
    rstd = jax.lax.rsqrt(variance + epsilon)
    mean_g = mean(upstream)
    mean_gx = (mean(upstream * d) - rest * mean_g) * rstd
    scale = gamma * rstd
    by_d = mean_gx * rstd * scale
    dx = upstream * scale - (d * by_d + (mean_g * scale - by_d * rest))
    return prevent_refusion(dx, upstream), n * mean_gx, n * mean_g


normalize.defvjp(_forward, _backward)


def _means(rows, like):
    """The mean over some axes, in the shape of a statistic."""
    return lambda x: jnp.reshape(jnp.mean(x, rows), like.shape)
