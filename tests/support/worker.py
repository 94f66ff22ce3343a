"""One worker of the cluster that TF_CONFIG names: `python worker.py FOLDER TASK ...`.

It leaves what it found in the folder, under its own number.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# As a script, it finds its neighbours from the folder of the tests.
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from support.distributed import (
    SpreadStep,
    draw,
    in_scope,
    parts_of,
    save_everywhere,
    split,
)
from support.steps import array
from support.training import Loop, model_of, rows

STEPS, EVERY = 8, 2
SHARES = (5, 3)


class Case(NamedTuple):
    """A step of a layer on two workers.

    Args:
        shares: rows of the batch for each of them.
        together: whether the layer is synchronized.
        masked: whether there is a mask.
        bad: whether the first worker's share is nothing but NaN.
    """

    shares: tuple = SHARES
    together: bool = True
    masked: bool = False
    bad: bool = False

    def draw(self):
        """Input, upstream gradient, mask or None, gamma and beta of the whole batch."""
        x, upstream, mask, gamma, beta = draw(self.shares)
        if self.bad:
            x[: self.shares[0]] = np.nan
        return x, upstream, mask if self.masked else None, gamma, beta

    def layer(self):
        return keras_bn.BatchNormalization(
            synchronized=self.together, dtype="float64", debias=self.bad
        )


CASES = {
    "uneven shares": Case(),
    "mask": Case(masked=True),
    "empty share": Case((0, 6)),
    "bad batch": Case(bad=True),
    "apart": Case(together=False, masked=True),
    "apart with an empty share": Case((0, 6), together=False),
    "apart with a bad batch": Case(together=False, bad=True),
}
SAVED = "apart"


def model_around(layer):
    return keras.Sequential([keras.Input((4, 3)), layer])


def layers(strategy, index, folder):
    """A step of each case; what each worker has of it, and every file of one."""
    for name, case in CASES.items():
        x, upstream, mask, gamma, beta = case.draw()
        layer = in_scope(strategy, case.layer, (4, 3), gamma, beta)
        parts = [split(array, case.shares) for array in (x, upstream, mask)]
        got = SpreadStep(strategy, layer)(*parts)
        got |= reads(strategy, layer.moving_mean)
        np.savez(folder / f"{name} {index}.npz", **got)
        if name == SAVED:
            (saved := folder / f"saved {index}").mkdir()
            with strategy.scope():
                model = model_around(layer)
            save_everywhere(model, saved)


def reads(strategy, variable):
    """The value of a variable, in every way to read it."""

    def read():
        return tf.identity(variable.value)

    def on_replica():
        return strategy.run(read)

    return {
        "read eagerly": array(variable.value),
        "read in a graph": array(tf.function(read, autograph=False)()),
        "read on a replica": parts_of(
            strategy, tf.function(on_replica, autograph=False)()
        )[0],
    }


def train(strategy, index, folder, dying_at=None):
    """Train to the last step, from the last checkpoint if there is one.

    Args:
        dying_at: the step in the middle of which this worker ends itself.
    """
    with strategy.scope():
        model, deadly = trainee()
    loop = Loop(strategy, model, SHARES)
    checkpoints = tf.train.CheckpointManager(
        checkpoint_of(model), str(folder / "checkpoints"), max_to_keep=2
    )
    checkpoints.restore_or_initialize()
    for step in range(int(model.optimizer.iterations.numpy()), STEPS):
        deadly.now = step == dying_at
        print(f"step {step}", flush=True)
        loop.step(step)
        if index == 0 and (step + 1) % EVERY == 0:
            checkpoints.save(step + 1)
    np.savez(folder / f"trained {index}.npz", *map(array, model.weights))


def trainee():
    """A model, compiled, and the layer in its middle that can end the process."""
    model = model_of(True, between=(deadly := Deadly()))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    return model, deadly


def checkpoint_of(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


class Deadly(keras.Layer):
    """Does nothing; or, when it is time, ends the process that it runs in."""

    now = False

    def call(self, x):
        with tf.control_dependencies([tf.numpy_function(self._check, [x], tf.bool)]):
            return tf.identity(x)

    def _check(self, _):
        if self.now:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def fit(strategy, index, folder):
    """Whether `fit` works, and if not, what Keras says."""
    with strategy.scope():
        model = model_of(True)
        model.compile("sgd", "mse")
    try:
        model.fit(*rows(16), batch_size=8, shuffle=False, verbose=0)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    (folder / f"fit {index}.json").write_text(json.dumps(said))


def alone(strategy, index, folder):
    """Train, and halfway have one worker alone do what makes copies of the model."""
    with strategy.scope():
        model = with_metrics()
    loop = Loop(strategy, model, SHARES)
    for step in range(STEPS):
        loop.step(step)
        if index == 1 and step == STEPS // 2:
            copies(model, folder)
    np.savez(folder / f"trained alone {index}.npz", *map(array, model.weights))
    # On all workers with the same data, which a warning asks for.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keras_bn.recalibrate(model, rows(128)[0], verbose=0)
    said = [str(warning.message) for warning in caught]
    (folder / f"warnings {index}.json").write_text(json.dumps(said))
    np.savez(folder / f"recalibrated {index}.npz", *map(array, model.weights))


def with_metrics():
    """A model without `Deadly`, compiled with what copies must take along."""
    model = model_of(True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
    return model


def copies(model, folder):
    """What the copies of a model compute, and how far their training is."""
    x, y = rows(16)
    theirs = keras_bn.to_keras(model)
    models = {
        "model": model,
        "folded": keras_bn.fold(model),
        "of Keras": theirs,
        "again": keras_bn.from_keras(theirs),
    }
    model.save(folder / "alone.keras")
    models["loaded"] = keras_bn.load_model(folder / "alone.keras")
    outputs = {name: array(each(x)) for name, each in models.items()}
    np.savez(folder / "copies.npz", **outputs)
    for name in ("of Keras", "again"):
        assert models[name].optimizer.iterations == model.optimizer.iterations
    # A copy is of this process alone, so that its own `fit` waits for nobody.
    models["again"].fit(x, y, verbose=0)
    assert keras_bn.replace(model).count_params()


def main(folder, *tasks):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index = strategy.cluster_resolver.task_id
    for task in tasks:
        name, _, argument = task.partition("=")
        options = {}
        if argument:
            worker, step = map(int, argument.split(","))
            options = {"dying_at": step} if worker == index else {}
        globals()[name](strategy, index, Path(folder), **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
