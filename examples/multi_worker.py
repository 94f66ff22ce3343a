"""Train one classifier on two workers, lose one of them, resume, and compare.

Starts two processes on this machine that train the model of dense_equivalence.py with
synchronized batch normalization, each on its share of every batch, in float64. In the
middle of it the first one is killed; then both start again from the last checkpoint.
Shows after every epoch how far they are from the same training in one process, and
ends with a verdict; the exit status is 0 if they are equivalent.

Where TF_CONFIG is set, it is one worker of that cluster and nothing more.
"""

from common import arguments, cluster_demo, snapshots, training  # isort: skip

import functools
import os
import re
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from dense_equivalence import TITLE, build

import keras_bn


def main(argv=None):
    """Run the example, or one worker of it.

    Args:
        argv: list of arguments; None for those of the command line.

    Returns:
        The exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    given, data = arguments.parse(__doc__, "out/multi_worker", argv, options)
    given.out.mkdir(parents=True, exist_ok=True)
    with training.precision("float64"):
        if "TF_CONFIG" in os.environ:
            return worker(given, data)
        alone = functools.partial(train, tf.distribute.get_strategy(), given, data)
        return cluster_demo.run(TITLE, alone, [__file__, *argv], given, data)


def options(add):
    add(
        "--apart",
        action="store_true",
        help="without synchronization, each worker by the statistics of its share",
    )


def worker(given, data):
    """Train as the worker that TF_CONFIG says, and leave a snapshot of each epoch."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index = strategy.cluster_resolver.task_id

    def tick(epoch, step, steps):
        if step % 5 == 0 or step == steps:
            print(f"epoch {epoch}, step {step} of {steps}", flush=True)

    try:
        trained = train(strategy, given, data, tick, given.out / "checkpoints")
        for epoch, snapshot in trained:
            snapshots.save(snapshots.path(given.out, epoch, index), snapshot)
            print(f"epoch {epoch} done, loss {snapshot.loss:.6f}", flush=True)
    except (tf.errors.UnavailableError, tf.errors.DeadlineExceededError) as error:
        why = re.search(r"Collective (ops|has)[^\n]*", error.message)
        print(f"lost: {why[0] if why else error}", flush=True)
        return 1
    return 0


def train(strategy, given, data, tick, folder=None):
    """Train under a strategy, from the last checkpoint if there is one.

    Args:
        strategy: a `tf.distribute.Strategy`.
        given: namespace with `epochs`, `batch_size`, `seed` and `apart`.
        data: a `Data`.
        tick: function of epoch, step, and steps of an epoch, called after each step.
        folder: path of the folder of checkpoints; None for none.

    Yields:
        `(epoch, Snapshot)` after each epoch; it is followed by a checkpoint.
    """
    keras.utils.set_random_seed(given.seed)
    side = Side(strategy, given.batch_size, synchronized=not given.apart)
    optimizer = side.model.optimizer
    checkpoints = None
    if folder is not None:
        checkpoints = tf.train.CheckpointManager(
            tf.train.Checkpoint(model=side.model, optimizer=optimizer),
            str(folder),
            max_to_keep=2,
        )
        checkpoints.restore_or_initialize()
    steps = len(data.x_train) // given.batch_size
    done = int(optimizer.iterations.numpy()) // steps
    for epoch in range(done + 1, given.epochs + 1):
        order = np.random.default_rng([given.seed, epoch]).permutation(
            len(data.x_train)
        )[: steps * given.batch_size]
        start = time.perf_counter()
        loss, accuracy = side.train(
            data.x_train[order],
            data.y_train[order],
            given.batch_size,
            lambda step, epoch=epoch: tick(epoch, step, steps),
        )
        seconds = time.perf_counter() - start
        yield (
            epoch,
            training.snapshot(side, data.x_val, data.y_val, loss, accuracy, seconds),
        )
        if checkpoints and is_chief(strategy):
            checkpoints.save(epoch)


def is_chief(strategy):
    """Whether this process is the one that writes what all need once."""
    resolver = strategy.cluster_resolver
    return resolver is None or resolver.task_id == 0


class Side(training.KerasSide):
    """The model on every replica of a strategy, each with its share of a batch."""

    def __init__(self, strategy, batch_size, synchronized):
        self.strategy, self.batch_size = strategy, batch_size
        with strategy.scope():
            model = build(
                functools.partial(
                    keras_bn.BatchNormalization, synchronized=synchronized
                )
            )
            super().__init__("", model, model.get_weights())
            model.optimizer.build(model.trainable_weights)
        self._step = tf.function(self._one_step, autograph=False)

    def train(self, x, y, batch_size, tick):
        sums, steps = 0, len(x) // batch_size
        pairs = zip(np.split(x, steps), np.split(y, steps), strict=True)
        for number, batch in enumerate(pairs, start=1):
            sums += self._step(*map(self._spread, batch)).numpy()
            tick(number)
        return sums / steps

    def outputs(self, x):
        return self.model(x, training=False).numpy()

    def _spread(self, rows):
        """To each replica its share; the sizes need not be equal."""
        shares = np.array_split(rows, self.strategy.num_replicas_in_sync)
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(shares[context.replica_id_in_sync_group])
        )

    def _one_step(self, x, y):
        """Loss and accuracy on the whole batch, after a step of the optimizer."""
        each = self.strategy.run(self._on_replica, (x, y))
        return self.strategy.reduce("SUM", each, axis=None)

    def _on_replica(self, x, y):
        weights = self.model.trainable_weights
        with tf.GradientTape() as tape:
            outputs = self.model(x, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(y, outputs)
            # Divided by the size of the whole batch: the optimizer adds up the
            # gradients of all replicas.
            loss = tf.reduce_sum(losses) / self.batch_size
        self.model.optimizer.apply(tape.gradient(loss, weights), weights)
        right = tf.cast(tf.argmax(outputs, axis=1) == tf.cast(y, "int64"), loss.dtype)
        return tf.stack([loss, tf.reduce_sum(right) / self.batch_size])


if __name__ == "__main__":
    sys.exit(main())
