"""The backends: what `contract` says, once for each of Keras's backends.

`formulas`, `autodiff`, `layout`, `averages` and `plan` are arithmetic in `keras.ops`,
for any backend. The folder of Keras's backend has what is fast there, and says how a
gradient is taken, how a function is compiled and how replicas communicate. Nothing
else in the package names a backend.
"""

import importlib
from typing import TYPE_CHECKING, cast

import keras

from keras_bn.backends.contract import Backend, Modes
from keras_bn.importing import BACKENDS

if keras.backend.backend() not in BACKENDS:
    raise ImportError(
        f"keras_bn runs on Keras's backends {', '.join(BACKENDS)}. Received: "
        f"KERAS_BACKEND={keras.backend.backend()!r}; set it to one of these before "
        "importing keras."
    )

_folder = f"keras_bn.backends.{keras.backend.backend()}"
backend = cast(Backend, importlib.import_module(_folder))
modes = cast(Modes, importlib.import_module(f"{_folder}.modes"))

if TYPE_CHECKING:
    # The folders give what the contract says.
    from keras_bn.backends import jax, tensorflow, torch

    _backends: list[Backend] = [tensorflow, jax, torch]
    _modes: list[Modes] = [tensorflow.modes, jax.modes, torch.modes]

__all__ = ["Backend", "Modes", "backend", "modes"]
