"""Refusing stored statistics that are invalid."""

import contextlib
import contextvars
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

_lenient = contextvars.ContextVar("lenient", default=False)

# The statistics of a layer that must not be negative, and the others.
_SPREADS = ("moving_variance", "moving_stddev", "renorm_stddev")
_MEANS = ("moving_mean", "renorm_mean")


class Checked(keras.layers.Layer):
    """A layer that refuses lost statistics, from a file or from `set_weights`.

    It checks `.keras` and `.weights.h5` files, its own `set_weights`, and `.h5` files
    of models that hold it directly. It cannot check `set_weights` of a model, nor
    `.h5` files where it is in a nested model: there Keras assigns to the variables.
    """

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        for i, variable in enumerate(self.variables):
            if str(i) in store.keys():  # noqa: SIM118 (a store is not a dict)
                self._check_stored(variable.name, store[str(i)])
        super().load_own_variables(store)

    def set_weights(self, weights: Sequence[Any]) -> None:
        for variable, value in zip(self.weights, weights, strict=False):
            self._check_stored(variable.name, value)
        super().set_weights(weights)

    def finalize_state(self) -> None:
        """Check the weights that Keras's `.h5` reader has just assigned."""
        for variable in self.variables:
            self._check_stored(variable.name, variable)

    def _check_stored(self, name, value):
        channel = None if _lenient.get() else lost(name, value)
        if channel is not None:
            rule = "negative or not finite" if name in _SPREADS else "not finite"
            value = np.asarray(keras.ops.convert_to_numpy(value))[channel]
            raise ValueError(
                f"Layer {self.name!r} can't load a {name.replace('_', ' ')} that is "
                f"{rule}. Received: {value} in channel "
                f"{channel[0] if len(channel) == 1 else channel}. "
                "`keras_bn.load_model` loads such a file, and `keras_bn.recalibrate` "
                "fixes the model."
            )


def lost(name, value):
    """The first channel in which a statistic is invalid, as a tuple; or None.

    Args:
        name: of the weight; a weight that is not a statistic gives None.
        value: array, tensor or variable.
    """
    if name not in (*_SPREADS, *_MEANS):
        return None
    value = np.asarray(keras.ops.convert_to_numpy(value))
    good = np.isfinite(value)
    if name in _SPREADS:
        good &= value >= 0
    bad = np.argwhere(~good)
    return tuple(int(i) for i in bad[0]) if len(bad) else None


@contextlib.contextmanager
def lenient():
    """Let layers load lost statistics in this context."""
    token = _lenient.set(True)
    try:
        yield
    finally:
        _lenient.reset(token)
