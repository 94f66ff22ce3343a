"""A layer under `keras.distribution.DataParallel` on eight devices of the host.

Usage: jax_devices.py FILE. FILE has x and upstream, in float64. Prints as JSON how far
the step is from one device's, by the name of what it gives.
"""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_ENABLE_X64"] = "1"

import keras
import numpy as np

import keras_bn


def fitted(x, y, synchronized):
    """The weights after two epochs of `fit`, in order."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:], dtype="float64"),
            keras.layers.Dense(8, dtype="float64"),
            keras_bn.BatchNormalization(dtype="float64", synchronized=synchronized),
            keras.layers.Dense(1, dtype="float64"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
    spread = len(model.layers[1].moving_mean.value.sharding.device_set)
    return [np.asarray(w) for w in model.get_weights()], spread


def main(path):
    with np.load(path) as data:
        x, y = data["x"], data["y"]
    alone, _ = fitted(x, y, False)
    devices = keras.distribution.list_devices()
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=devices)
    )
    apart = {}
    for synchronized in (False, True):
        got, spread = fitted(x, y, synchronized)
        differences = [np.abs(a - b).max() for a, b in zip(alone, got, strict=True)]
        apart[str(synchronized)] = float(max(differences))
    print(json.dumps({"devices": len(devices), "holding": spread, "apart": apart}))


if __name__ == "__main__":
    main(sys.argv[1])
