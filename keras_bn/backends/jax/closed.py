r"""The closed form with a derivative of its own, for a batch without a mask.

`autodiff` says what is computed. Here the derivative is written so that JAX makes of it
a backward pass with two sums, the gradients of beta and of gamma:

$$\dot y = k\,\dot x + d\,\dot a + \dot b, \quad
  \dot a = \frac{\dot\gamma - k\,\overline{\hat x\,\dot x}}{\sqrt{\sigma^2+\epsilon}},
  \quad \dot b = \dot\beta - k\,\overline{\dot x} - \rho\,\dot a$$

XLA on a CPU would compute a tensor anew wherever it is used, again and again in a chain
of layers: hence `prevent_refusion`, in the backward pass too.
"""

import functools

import jax
import jax.numpy as jnp

from keras_bn.backends.formulas import prevent_refusion
from keras_bn.backends.layout import Layout
from keras_bn.moments import Moments


def forward(x, gamma, beta, epsilon, axes):
    """Normalize a batch with its own statistics; see the contract of the backends."""
    lay = Layout(x, axes)
    gamma, beta = lay.parameter(gamma, 1.0, x.dtype), lay.parameter(beta, 0.0, x.dtype)
    y, *statistics = normalize(x, gamma, beta, epsilon, axes)
    moments = lay.count(x, None), *statistics
    return y, Moments(*(jax.lax.stop_gradient(lay.statistic(m)) for m in moments))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def normalize(x, gamma, beta, epsilon, axes):
    """Normalize a batch with its own statistics.

    Args:
        x: input, float32 or float64, not empty.
        gamma, beta: scale and offset, in the inner shape of the layout.
        epsilon: added to the variance, non-negative.
        axes: the channel axes.

    Returns:
        `(y, mean, variance)`, the statistics without derivative, in the shape of gamma.
    """
    d, mean, rest, variance = _statistics(x, axes)
    scale = gamma * jax.lax.rsqrt(variance + epsilon)
    return prevent_refusion(d * scale + (beta - rest * scale), x), mean, variance


@normalize.defjvp
def _derivative(epsilon, axes, primals, tangents):
    x, gamma, beta = primals
    dx, d_gamma, d_beta = tangents
    d, mean, rest, variance = _statistics(x, axes)
    average = _average(x, axes)
    rstd = jax.lax.rsqrt(variance + epsilon)
    scale = gamma * rstd
    y = prevent_refusion(d * scale + (beta - rest * scale), x)
    # In the backward pass this is `prevent_refusion`.
    dx = jnp.where(x == x, dx, jnp.zeros_like(dx))
    mean_dx = average(dx)
    slope = rstd * (d_gamma - scale * rstd * (average(d * dx) - rest * mean_dx))
    level = d_beta - scale * mean_dx - rest * slope
    constants = jnp.zeros_like(mean), jnp.zeros_like(variance)
    return (y, mean, variance), (scale * dx + (d * slope + level), *constants)


def _statistics(x, axes):
    """The input less a shift, and in the inner shape: mean, rest of it, variance."""
    average = _average(x, axes)
    near, shift, d = Layout(x, axes, xla=True).shifted(x, None)
    rest = average(d)
    variance = jax.nn.relu(average(d * d) - rest * rest)
    return d, near + (shift + rest), rest, variance


def _average(x, axes):
    """The mean over what belongs to one channel, in the inner shape of the layout."""
    lay = Layout(x, axes)
    return lambda value: lay.sum(value) / lay.count(x, None)
