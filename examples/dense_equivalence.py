"""Train one small classifier twice, with Keras's batch normalization and with this one.

Dense(64) on 784 inputs, BatchNormalization, ReLU, Dense(10), softmax; Adam. Both get
the same initial weights and the same batches in the same order, in float32 and again
in float64. Shows how far apart they are after every epoch, saves both, loads them
again, and ends with a verdict; the exit status is 0 if they are equivalent.
"""

import digits  # isort: skip (before Keras: it sets TensorFlow's logging)

import sys

import equivalence
import keras
import numpy as np
import report

import keras_bn

TITLE = "Dense(64), batch normalization, ReLU, Dense(10), softmax"


def build(normalization):
    """The model, with a layer made by `normalization`."""
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(64, name="hidden"),
            normalization(name="norm"),
            keras.layers.ReLU(),
            keras.layers.Dense(10, activation="softmax", name="classes"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class Side(equivalence.KerasSide):
    """The model with one of the two layers."""

    def train(self, x, y, batch_size, tick):
        watch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: tick()
        )
        fitted = self.model.fit(
            x, y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[watch]
        )
        return fitted.history["loss"][0], fitted.history["accuracy"][0]


def main(argv=None, ours=keras_bn.BatchNormalization):
    """Run the example.

    Args:
        argv: list of arguments; None for those of the command line.
        ours: makes the layer that is compared with Keras's.

    Returns:
        The exit status.
    """
    given, data = digits.parse(__doc__, "out/dense_equivalence", argv)
    keras.utils.set_random_seed(given.seed)
    weights = build(keras.layers.BatchNormalization).get_weights()

    def reference_side():
        return side("Keras", keras.layers.BatchNormalization)

    def our_side():
        return side(equivalence.OURS, ours)

    def side(name, normalization):
        model = build(normalization)
        model.set_weights(weights)
        return Side(name, model)

    runs = []
    with report.Report() as shown:
        for dtype in ("float32", "float64"):
            with equivalence.precision(dtype):
                run, *sides = equivalence.side_by_side(
                    TITLE, dtype, reference_side, our_side, data, given, shown
                )
                for trained in sides:
                    path = given.out / f"{trained.name}_{dtype}.keras".lower()
                    same = reloads_identical(trained.model, path, data.x_val)
                    run.reloaded_identical[trained.name] = same
            runs.append(run)
        shown.hardest(runs[0], data)
        shown.judgement(runs)
        report.save_table(given.out / "table.json", runs, given)
        report.save_curves(given.out / "curves.png", runs)
        return shown.verdict(
            all(run.equivalent() for run in runs),
            "Table, curves and models",
            given.out,
        )


def reloads_identical(model, path, x):
    """Save the model, load it, and say whether its outputs stay the same to the bit."""
    model.save(path)
    reloaded = keras.models.load_model(path)
    return np.array_equal(model.predict_on_batch(x), reloaded.predict_on_batch(x))


if __name__ == "__main__":
    sys.exit(main())
