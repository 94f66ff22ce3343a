"""What is stored beside the weights of a layer, and refusing invalid statistics."""

import contextlib
import contextvars
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_bn.layer.arguments import BEYOND_KERAS, OPTIONS

# The custom objects of the `keras_bn.load_model` that is running; None for none.
_loading: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "loading", default=None
)

# The statistics of a layer that must not be negative, and the others.
_VARIANCES = ("moving_variance", "moving_stddev", "renorm_stddev")
_MEANS = ("moving_mean", "renorm_mean")


# Options that can be set on a built layer: the others need weights of their own.
_OPTIONS = OPTIONS.keys() - {"axis", "center", "scale", "renorm", "debias"}
_OPTIONS -= {"adapt_memory"}
_ASSET = "keras_bn.json"


class StoredOptions(keras.layers.Layer):
    """A layer that stores its options beside its weights, in a `.keras` file.

    A model whose class makes its own layers has no options of theirs in its config.
    `keras_bn.load_model` reads them from here; for Keras's own layer they are nothing.
    """

    # Names of options in the order in which they were set, each time it is set last.
    set_later: tuple[str, ...] = ()

    def save_assets(self, folder: str) -> None:
        if options := options_beside(self):
            file = pathlib.Path(folder, _ASSET)
            file.write_text(json.dumps(options), encoding="utf-8")

    def load_assets(self, folder: str | None) -> None:
        file = None if folder is None else pathlib.Path(folder, _ASSET)
        if file is None or not file.exists():
            return
        options = json.loads(file.read_text(encoding="utf-8"))
        for name, value in options.items():
            # Most models have it from their config, where the user's classes are known.
            if name in _OPTIONS and value != _serialized(self, name):
                value = keras.saving.deserialize_keras_object(value, _loading.get())
                setattr(self, name, value)


def options_beside(layer: keras.layers.Layer) -> dict[str, Any]:
    """The options of a layer that are stored beside its weights.

    They are those that Keras's layer has not, where used, and those set later.
    """
    used = [n for n, unused in BEYOND_KERAS.items() if getattr(layer, n) != unused]
    return {
        name: _serialized(layer, name)
        for name in (*sorted({*used} - {*layer.set_later}), *layer.set_later)
        if name in _OPTIONS
    }


def _serialized(layer, name):
    return keras.saving.serialize_keras_object(getattr(layer, name))


class ValidStatistics(keras.layers.Layer):
    """A layer that refuses invalid statistics, from a file or from `set_weights`.

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

    def _check_stored(self, name: str, value: Any) -> None:
        channel = None if _loading.get() is not None else invalid_channel(name, value)
        if channel is not None:
            rule = "negative or not finite" if name in _VARIANCES else "not finite"
            value = np.asarray(keras.ops.convert_to_numpy(value))[channel]
            raise ValueError(
                f"Layer {self.name!r} can't load a {name.replace('_', ' ')} that is "
                f"{rule}. Received: {value} in channel "
                f"{channel[0] if len(channel) == 1 else channel}. "
                "`keras_bn.load_model` loads such a file, and `keras_bn.recalibrate` "
                "fixes the model."
            )


def invalid_channel(name: str, value: Any) -> tuple[int, ...] | None:
    """The first channel in which a statistic is invalid, as a tuple; or None.

    Args:
        name: of the weight; a weight that is not a statistic gives None.
        value: array, tensor or variable.
    """
    if name not in (*_VARIANCES, *_MEANS):
        return None
    value = np.asarray(keras.ops.convert_to_numpy(value))
    valid = np.isfinite(value)
    if name in _VARIANCES:
        valid &= value >= 0
    invalid = np.argwhere(~valid)
    return tuple(int(i) for i in invalid[0]) if len(invalid) else None


@contextlib.contextmanager
def loading(custom_objects: dict[str, Any]) -> Iterator[None]:
    """Let layers load invalid statistics in this context, and options of classes."""
    token = _loading.set(custom_objects)
    try:
        yield
    finally:
        _loading.reset(token)
