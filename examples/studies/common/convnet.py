"""A small convolutional classifier of scikit-learn's digits, and how it is trained."""

import keras
import numpy as np
from keras import layers


def convnet(normalization, classes=10, strides=(1, 2, 2), filters=(16, 32, 32)):
    """Convolutions of 3x3 without bias, each normalized and cut by a ReLU, and a head.

    Args:
        normalization: called with a `name`, makes a normalization layer.
        classes: how many classes the head tells apart.
        strides: of each convolution.
        filters: of each convolution.

    Returns:
        A `keras.Sequential` of two parts: the base, itself a `keras.Sequential` from
        images of shape (batch, 8, 8, 1) to features, and a Dense layer that gives
        logits.
    """
    base = [keras.Input((8, 8, 1))]
    for i, (units, stride) in enumerate(zip(filters, strides, strict=True), start=1):
        base += [
            layers.Conv2D(units, 3, stride, padding="same", use_bias=False),
            normalization(name=f"norm_{i}"),
            layers.ReLU(),
        ]
    base = keras.Sequential([*base, layers.GlobalAveragePooling2D()], name="base")
    return keras.Sequential([base, layers.Dense(classes, name="head")])


def prepare(model, optimizer, steps_per_execution=1):
    """Compile a classifier that gives logits."""
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=steps_per_execution,
    )
    return model


def accuracy(model, x, y, training=False):
    """The share of images classified right; with `training`, by batch statistics."""
    return float(np.mean(np.argmax(model(x, training=training), -1) == y))
