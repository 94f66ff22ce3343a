"""Trains a model with the rounding of int8, on Keras's backend in this process.

    python aware_side.py FOLDER

writes FOLDER/model.keras and FOLDER/weights.npz. The weights at the start and the data
are the same on every backend.
"""

import pathlib
import sys

import keras
import numpy as np
from keras import layers

import keras_bn

STEPS, BATCH = 20, 16


def data():
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(STEPS * BATCH, *shape)).astype("float32")
        for shape in ((8, 8, 3), (3,))
    ]


def trained():
    """A model after some steps of SGD: every kind of rounding is in it."""
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(image)
    x = skip = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(x))
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.BatchNormalization(name="depthwise_bn")(x)
    x = layers.ReLU(name="sum_relu")(layers.Add(name="sum")([x, skip]))
    x = layers.SeparableConv2D(5, 3, activation="tanh", name="separable")(x)
    x = layers.BatchNormalization(name="alone")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(image, layers.Dense(3, name="head")(x))
    rng = np.random.default_rng(1)
    for variable in model.variables:
        value = rng.normal(scale=0.4, size=variable.shape)
        around = 1.0 if variable.name in ("gamma", "moving_variance") else 0.0
        variable.assign(around + value * (0.3 if around else 1.0))
    x, y = data()
    aware = keras_bn.quantize_aware(model, x, batch_size=BATCH)
    aware.compile(keras.optimizers.SGD(0.01), "mse")
    aware.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    return aware


def main(folder):
    aware = trained()
    aware.save(folder / "model.keras")
    np.savez(
        folder / "weights.npz",
        **{v.path: keras.ops.convert_to_numpy(v) for v in aware.variables},
    )


if __name__ == "__main__":
    keras.config.disable_traceback_filtering()
    main(pathlib.Path(sys.argv[1]))
