"""The whole models that are measured, and the data they are trained on."""

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from keras_bn import verify

# (application, side of its square images, batch size)
QUICK = [("MobileNetV2", 96, 16), ("ResNet50", 96, 16)]
USUAL = [*QUICK, ("EfficientNetB0", 64, 16), ("DenseNet121", 64, 16)]
FULL = [*USUAL, ("MobileNetV2", 128, 32), ("ResNet50", 128, 32)]
WITHOUT = "without"
KINDS = (verify.PEER, verify.OURS, WITHOUT)
# Ours with all statistics frozen: by themselves, and fused with the layers before them.
FROZEN, FUSED = "frozen", "fused"
FROZEN_KINDS = (FROZEN, FUSED, WITHOUT)
CLASSES = 10


class Nothing(keras.layers.Layer):
    """What takes the place of a normalization that is left out."""

    def call(self, x, mask=None):
        return x


def build(application, size, kind, jit=False):
    """An application, compiled, with Keras's normalization, ours, or none.

    Ours is put in as users do it. The models differ in nothing else.

    Args:
        application: name of a model in `keras.applications`, or a function that takes
            the same arguments.
        size: side of its square images.
        kind: one of `KINDS` or `FROZEN_KINDS`.
        jit: whether XLA compiles its steps; if not, Keras decides as by default.
    """
    named = isinstance(application, str)
    make = getattr(keras.applications, application) if named else application
    model = make(weights=None, input_shape=(size, size, 3), classes=CLASSES)
    if kind in (verify.OURS, FROZEN, FUSED):
        model = keras_bn.from_keras(model)
    if kind in (FROZEN, FUSED):
        keras_bn.freeze(model, fuse=kind == FUSED)
    if kind == WITHOUT:
        model = keras.models.clone_model(model, clone_function=_without)
    jit_compile = True if jit else "auto"
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=jit_compile)
    return model


def _without(layer):
    if isinstance(layer, keras.layers.BatchNormalization):
        return Nothing(name=layer.name)
    return layer.__class__.from_config(layer.get_config())


def data(size, batch):
    """One batch of images with labels, for ever, its size unknown while tracing."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, size, size, 3)).astype("float32")
    labels = rng.integers(0, CLASSES, batch)
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch).repeat()


def title(row):
    """The model of a row, in words."""
    size = row["size"]
    return f"{row['model']}, {size}×{size}, batch {row['batch']}"
