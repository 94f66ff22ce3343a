"""Train one small classifier twice, with Keras's batch normalization and with this one.

Dense(64) on 784 inputs, BatchNormalization, ReLU, Dense(10), softmax; Adam. Both get
the same initial weights and the same batches in the same order, in float32 and again
in float64. Shows how far apart they are after every epoch, saves both, loads them
again, and ends with a verdict; the exit status is 0 if they are equivalent.
"""

from common import arguments, plots, report, results, training  # isort: skip

import sys

import keras
import numpy as np

import keras_bn

TITLE = "Dense(64), batch normalization, ReLU, Dense(10), softmax"


def main(argv=None, ours=keras_bn.BatchNormalization):
    """Run the example.

    Args:
        argv: list of arguments; None for those of the command line.
        ours: makes the layer that is compared with Keras's.

    Returns:
        The exit status.
    """
    given, data = arguments.parse(__doc__, "out/dense_equivalence", argv)
    given.out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(given.seed)
    weights = build(keras.layers.BatchNormalization).get_weights()

    def side(name, layer):
        return training.KerasSide(name, build(layer), weights)

    runs = []
    with report.Report() as shown:
        for dtype in ("float32", "float64"):
            with training.precision(dtype):
                run, *sides = training.side_by_side(
                    TITLE,
                    dtype,
                    lambda: side("Keras", keras.layers.BatchNormalization),
                    lambda: side(training.OURS, ours),
                    data,
                    given,
                    shown,
                )
                for trained in sides:
                    path = given.out / f"{trained.name}_{dtype}.keras".lower()
                    same = reloads_identical(trained.model, path, data.x_val)
                    run.reloaded_identical[trained.name] = same
            runs.append(run)
        shown.hardest(runs[0], data)
        shown.judgement(runs)
        results.save(given.out / "table.json", runs, given)
        plots.save(given.out / "curves.png", runs)
        shown.written("Table, curves and models", given.out)
        return shown.verdict(all(run.equivalent() for run in runs))


def build(normalization):
    """The model, with a layer made by `normalization`."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(64, name="hidden"),
            normalization(name="norm"),
            keras.layers.ReLU(),
            keras.layers.Dense(10, activation="softmax", name="classes"),
        ]
    )


def reloads_identical(model, path, x):
    """Save the model, load it, and say whether its outputs stay the same to the bit."""
    model.save(path)
    reloaded = keras.models.load_model(path)
    return np.array_equal(model.predict_on_batch(x), reloaded.predict_on_batch(x))


if __name__ == "__main__":
    sys.exit(main())
