"""Reloading SavedModels and comparing them, to the bit, with arrays beside them.

Imports nothing from keras_bn: as a script it runs where that can't be imported.
"""

import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

LOADERS = {
    "tf.saved_model.load": tf.saved_model.load,
    "TFSMLayer": keras.layers.TFSMLayer,
}


def arrays_beside(path):
    return np.load(pathlib.Path(path) / "arrays.npz")


def compare_exported(path):
    """Reload an exported model in both ways; yield what was compared."""
    arrays = arrays_beside(path)
    for name, load in LOADERS.items():
        reloaded = load(str(path))
        serve = getattr(reloaded, "serve", reloaded)
        for key in sorted(arrays):
            if key.startswith("x"):
                y = serve(tf.constant(arrays[key], tf.float32))
                want = arrays[key.replace("x", "y")]
                np.testing.assert_array_equal(tf.cast(y, tf.float64), want)
                yield f"{name} {key}"


def gradients(forward, parameters, x, upstream):
    """The gradients of `forward`, taken from outside it."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = forward(x)
    return tape.gradient(y, [x, *parameters], tf.cast(upstream, y.dtype))


def second_gradient(forward, x, upstream):
    """The gradient of a gradient penalty."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        (dx,) = gradients(forward, [], x, upstream)
        penalty = tf.reduce_sum(tf.square(dx))
    return tape.gradient(penalty, x)


def results_of(trainer, x, upstream, second):
    """What a reloaded trainer gives, by name, in the order in which it was recorded."""
    yield "applied", trainer.signatures["apply"](x)["output_0"]
    outside = gradients(trainer.forward, trainer.parameters, x, upstream)
    yield from ((f"gradient{i}", g) for i, g in enumerate(outside))
    yield from trainer.signatures["train"](x=x, upstream=upstream).items()
    variables = [*trainer.parameters, *trainer.statistics]
    yield from ((f"variable{i}", v) for i, v in enumerate(variables))
    if second:
        yield "second", second_gradient(trainer.forward, x, upstream)


def compare_trainer(path):
    """Reload a trainer and let it do the same again; yield what was compared."""
    arrays = arrays_beside(path)
    x, upstream = (tf.constant(arrays[n], tf.float32) for n in ("x", "upstream"))
    trainer = tf.saved_model.load(str(path))
    for name, got in results_of(trainer, x, upstream, "second" in arrays):
        np.testing.assert_array_equal(tf.cast(got, tf.float64), arrays[name], name)
        yield name


if __name__ == "__main__":
    for path in sys.argv[1:]:
        trainer = "upstream" in arrays_beside(path)
        print(*(compare_trainer if trainer else compare_exported)(path), sep="\n")
