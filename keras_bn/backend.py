"""Importing Keras, with a sentence where its backend is not installed."""

import os

BACKENDS = ("tensorflow", "torch", "jax")

try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    missing = (error.name or "").split(".")[0]
    if missing not in BACKENDS:
        raise
    raise ImportError(
        f"Keras's backend is {missing!r}, which is not installed: `pip install "
        f"{missing}`, or set KERAS_BACKEND to another of {', '.join(BACKENDS)} "
        "before Keras is imported. Received: "
        f"KERAS_BACKEND={os.environ.get('KERAS_BACKEND')!r}"
    ) from error
