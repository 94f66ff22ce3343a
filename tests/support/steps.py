"""One training step of a layer, in any mode, as arrays; the oracle's beside it."""

import functools

import numpy as np
import oracle
import tensorflow as tf

MODES = ("eager", "graph", "xla")


def in_mode(function, mode):
    """`function` run eagerly, as a `tf.function`, or compiled by XLA."""
    if mode == "eager":
        return function
    # A partial, or TensorFlow takes every new test for a retrace of one function.
    function = functools.partial(function)
    return tf.function(function, jit_compile=mode == "xla", autograph=False)


def array(tensor):
    """Anything tensor-like as a float64 array."""
    return tf.cast(tf.convert_to_tensor(tensor), tf.float64).numpy()


def set_parameters(layer, gamma, beta):
    if layer.scale:
        layer.gamma.assign(gamma)
    if layer.center:
        layer.beta.assign(beta)


class Step:
    """A training step of a layer in one mode, from fresh moving statistics (0 and 1).

    Called with an input and an upstream gradient, it gives a dict of float64 arrays:
    y, dx, d_gamma, d_beta, moving_mean, moving_variance; without what the layer has
    not.
    """

    def __init__(self, layer, mode="eager", mask=None):
        self.layer = layer
        self.names = [n for n in ("gamma", "beta") if getattr(layer, n) is not None]
        weights = [getattr(layer, n).value for n in self.names]

        def run(x, upstream):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, mask=mask)
            return y, tape.gradient(y, [x, *weights], output_gradients=upstream)

        self.run = in_mode(run, mode)

    def __call__(self, x, upstream):
        layer = self.layer
        layer.moving_mean.assign(np.zeros(layer.moving_mean.shape))
        layer.moving_variance.assign(np.ones(layer.moving_variance.shape))
        x = tf.constant(x, layer.compute_dtype)
        y, (dx, *d_weights) = self.run(x, tf.constant(upstream, x.dtype))
        return {
            "y": array(y),
            "dx": array(dx),
            **{f"d_{n}": array(d) for n, d in zip(self.names, d_weights, strict=True)},
            "moving_mean": array(layer.moving_mean.value),
            "moving_variance": array(layer.moving_variance.value),
        }


def oracle_step(layer, x, upstream, axes, gamma, beta, mask=None):
    """What `Step` must give."""
    x = array(tf.constant(x, layer.compute_dtype))
    upstream = array(tf.constant(upstream, layer.compute_dtype))
    gamma = gamma if layer.scale else np.ones_like(gamma)
    beta = beta if layer.center else np.zeros_like(beta)
    _, mean, variance = oracle.moments(x, axes, mask)
    dx, d_gamma, d_beta = oracle.backward(x, gamma, axes, layer.epsilon, upstream, mask)
    want = {
        "y": oracle.forward(x, gamma, beta, axes, layer.epsilon, mask),
        "dx": dx,
        "moving_mean": oracle.moving(0, mean, layer.momentum),
        "moving_variance": oracle.moving(1, variance, layer.momentum),
    }
    if layer.scale:
        want["d_gamma"] = d_gamma
    if layer.center:
        want["d_beta"] = d_beta
    return want


def relative_error(got, want):
    """The largest difference, in units of the largest value wanted."""
    return np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-300)
