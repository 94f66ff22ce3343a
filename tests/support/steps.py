"""One training step of a layer, in any mode, as arrays; the oracle's beside it."""

import numpy as np
import oracle

from support import backend
from support.backend import MODES, array, in_mode

__all__ = [
    "MODES",
    "Step",
    "array",
    "in_mode",
    "oracle_step",
    "relative_error",
    "set_parameters",
]


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
        self.run = backend.training_step(
            lambda x: layer(x, training=True, mask=mask), self.variables(), mode
        )

    def variables(self):
        """Those of the layer: first what has a gradient, in the order of the names."""
        weights = [getattr(self.layer, name) for name in self.names]
        known = {id(weight) for weight in weights}
        return [*weights, *(v for v in self.layer.variables if id(v) not in known)]

    def __call__(self, x, upstream):
        layer = self.layer
        layer.moving_mean.assign(np.zeros(layer.moving_mean.shape))
        layer.moving_variance.assign(np.ones(layer.moving_variance.shape))
        x, upstream = (backend.tensor(t, layer.compute_dtype) for t in (x, upstream))
        y, (dx, *d_weights) = self.run(x, upstream)
        return {
            "y": array(y),
            "dx": array(dx),
            **{f"d_{n}": array(d) for n, d in zip(self.names, d_weights, strict=True)},
            "moving_mean": array(layer.moving_mean.value),
            "moving_variance": array(layer.moving_variance.value),
        }


def oracle_step(layer, x, upstream, axes, gamma, beta, mask=None):
    """What `Step` must give."""
    x, upstream = (array(backend.tensor(t, layer.compute_dtype)) for t in (x, upstream))
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
