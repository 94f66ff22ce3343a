"""Trains a model on Keras's PyTorch backend and saves it, with what it computes.

    python pytorch_side.py FOLDER

writes FOLDER/model.keras and FOLDER/arrays.npz. It runs in a process of its own, in
which Keras's backend is another than in the tests.
"""

import pathlib
import sys

import keras
import numpy as np
from keras import layers

import keras_bn


def model():
    """Keras's layer after a convolution, in a model in the model, and after a Dense."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, use_bias=False, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="bn_conv", momentum=0.9)(x))
    block = keras.Sequential(
        [
            keras.Input((6, 6, 8)),
            layers.DepthwiseConv2D(3, padding="same", name="depthwise"),
            layers.BatchNormalization(name="bn_depthwise", momentum=0.9),
        ],
        name="block",
    )
    x = layers.add([x, block(x)])
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(6, name="features")(x)
    x = layers.BatchNormalization(name="bn_dense", momentum=0.9)(x)
    return keras.Model(image, layers.Dense(3, activation="softmax")(x))


def main(folder):
    assert keras.backend.backend() == "torch"
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    # At a mean of 100 deviations, the layer of Keras is off by 0.005 on PyTorch.
    x = rng.normal(100.0, 1.0, (96, 8, 8, 3))
    x[np.arange(96), labels, :, 0] += 3.0
    x = x.astype("float32")
    ours = keras_bn.from_keras(model())
    ours.compile(
        keras.optimizers.Adam(0.01),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    history = ours.fit(x, labels, batch_size=16, epochs=6, verbose=0).history
    keras_bn.recalibrate(ours, x, prior=16, exact=True, verbose=0)
    ours.save(folder / "model.keras")
    np.savez(
        folder / "arrays.npz",
        x=x,
        labels=labels,
        y=ours.predict(x, verbose=0),
        loss=history["loss"],
        weights=np.concatenate([w.ravel() for w in ours.get_weights()]),
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
