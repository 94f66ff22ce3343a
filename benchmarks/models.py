"""What normalization costs in whole models, trained by `fit` as users do."""

import argparse
import time

import keras
import numpy as np
import tensorflow as tf

import keras_bn

APPLICATIONS = ("MobileNetV2", "ResNet50")
KINDS = ("Keras", "keras_bn", "without")


class Nothing(keras.layers.Layer):
    """What takes the place of a normalization that is left out."""

    def call(self, x, mask=None):
        return x


def build(application, size, kind):
    """The application with Keras's normalization, ours, or none."""

    def replace(layer):
        if not isinstance(layer, keras.layers.BatchNormalization):
            return layer.__class__.from_config(layer.get_config())
        if kind == "without":
            return Nothing(name=layer.name)
        cls = keras_bn.BatchNormalization if kind == "keras_bn" else type(layer)
        return cls.from_config(layer.get_config())

    model = getattr(keras.applications, application)(
        weights=None, input_shape=(size, size, 3), classes=10
    )
    model = keras.models.clone_model(model, clone_function=replace)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


class StepTimes(keras.callbacks.Callback):
    """Seconds of each training step."""

    def on_train_begin(self, logs=None):
        self.times = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter() - self.start)


def measure(application, size, batch, rounds=5, steps=4):
    """Milliseconds per step of each kind, and our share of normalization by Keras's."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, size, size, 3)).astype("float32")
    labels = rng.integers(0, 10, batch)
    data = tf.data.Dataset.from_tensor_slices((x, labels)).batch(batch).repeat()
    models = {kind: build(application, size, kind) for kind in KINDS}
    times = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        for kind, model in models.items():
            timer = StepTimes()
            model.fit(
                data, steps_per_epoch=steps, verbose=0, callbacks=[timer], shuffle=False
            )
            times[kind] += timer.times if turn else []
    ms = {kind: 1e3 * float(np.median(t)) for kind, t in times.items()}
    share = (ms["keras_bn"] - ms["without"]) / (ms["Keras"] - ms["without"])
    return {
        "model": application,
        "size": size,
        "batch": batch,
        "ms": ms,
        "share": share,
    }


def table(rows):
    """The rows as a table in Markdown."""
    lines = ["| model | Keras, ms | ours, ms | without, ms | our share of the cost |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = " | ".join(f"{row['ms'][kind]:.0f}" for kind in KINDS)
        name = f"{row['model']}, {row['size']}×{row['size']}, batch {row['batch']}"
        lines.append(f"| {name} | {cells} | {row['share']:.2f} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    rows = [
        measure(name, arguments.size, arguments.batch, arguments.rounds)
        for name in APPLICATIONS
    ]
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
