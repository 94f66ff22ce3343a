"""Train one classifier on two workers, lose one of them, resume, and compare.

Starts two processes on this machine that train the model of dense_equivalence.py with
synchronized batch normalization, each on its share of every batch, in float64. In the
middle of it the first one is killed; then both start again from the last checkpoint.
Shows after every epoch how far they are from the same training in one process, and
ends with a verdict; the exit status is 0 if they are equivalent.

Where TF_CONFIG is set, it is one worker of that cluster and nothing more.
"""

import digits  # isort: skip (before Keras: it sets TensorFlow's logging)

import functools
import os
import re
import shutil
import sys
import time

import equivalence
import keras
import numpy as np
import report
import tensorflow as tf
from dense_equivalence import TITLE, build
from rich.text import Text
from studies.common.terminal import bad, good
from workers import WorkerError, cluster

import keras_bn

WORKERS = 2
# Importing TensorFlow takes its time, and so does noticing that a worker is gone.
SECONDS = 120


class Side(equivalence.KerasSide):
    """The model on every replica of a strategy, each with its share of a batch.

    `fit` fails under this strategy, in Keras itself (docs/distributed.md), so `train`
    is a loop around `strategy.run`.
    """

    def __init__(self, strategy, batch_size, synchronized):
        self.strategy, self.batch_size = strategy, batch_size
        layer = functools.partial(
            keras_bn.BatchNormalization, synchronized=synchronized
        )
        with strategy.scope():
            super().__init__("", build(layer))
            self.model.optimizer.build(self.model.trainable_weights)
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
        shuffle = np.random.default_rng([given.seed, epoch])
        order = shuffle.permutation(len(data.x_train))[: steps * given.batch_size]
        start = time.perf_counter()
        loss, accuracy = side.train(
            data.x_train[order],
            data.y_train[order],
            given.batch_size,
            lambda step, epoch=epoch: tick(epoch, step, steps),
        )
        seconds = time.perf_counter() - start
        yield epoch, equivalence.Snapshot.of(side, data, loss, accuracy, seconds)
        if checkpoints and is_chief(strategy):
            checkpoints.save(epoch)


def is_chief(strategy):
    """Whether this process is the one that writes what all need once."""
    resolver = strategy.cluster_resolver
    return resolver is None or resolver.task_id == 0


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
            save_snapshot(snapshot_path(given.out, epoch, index), snapshot)
            print(f"epoch {epoch} done, loss {snapshot.loss:.6f}", flush=True)
    except (tf.errors.UnavailableError, tf.errors.DeadlineExceededError) as error:
        why = re.search(r"Collective (ops|has)[^\n]*", error.message)
        print(f"lost: {why[0] if why else error}", flush=True)
        return 1
    return 0


def snapshot_path(folder, epoch, index):
    """Where a worker's snapshot of an epoch is, for the process that started it."""
    return folder / "snapshots" / f"epoch_{epoch}_worker_{index}.npz"


def save_snapshot(path, snapshot):
    """Write a `Snapshot`, whole or not at all."""
    content = snapshot.numbers()
    for quantity, arrays in snapshot.arrays.items():
        content |= {f"{quantity}: {name}": array for name, array in arrays.items()}
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, **content)
    part.replace(path)


def load_snapshot(path):
    """The `Snapshot` that `save_snapshot` wrote."""
    numbers, arrays = {}, {}
    with np.load(path) as content:
        for key, array in content.items():
            quantity, _, name = key.partition(": ")
            if name:
                arrays.setdefault(quantity, {})[name] = array
            else:
                numbers[key] = float(array)
    return equivalence.Snapshot(**numbers, arrays=arrays)


class Demo:
    """Trainings in this process and in two workers, and what is known of them so far.

    Attributes:
        reference: list of the `Snapshot`s of the training in one process.
        identical: whether the workers had the same bits after every epoch.
    """

    def __init__(self, shown, compared, command, given, data):
        self.shown, self.compared = shown, compared
        self.command, self.given, self.data = command, given, data
        self.reference, self.identical = [], True
        self._furthest = (0, 0)

    def train_alone(self):
        """Train in this process."""

        def tick(epoch, step, steps):
            if step == 1:
                self.shown.side(epoch, self.compared.reference)
            self.shown.step()

        strategy = tf.distribute.get_strategy()
        for _, snapshot in train(strategy, self.given, self.data, tick):
            self.reference.append(snapshot)

    def train_together(self, killing=None):
        """Have the workers train, to the end or until one of them is killed.

        Args:
            killing: the epoch in the middle of which the first worker is killed.

        Returns:
            With `killing`, after how many seconds the other worker gave up.
        """
        with cluster(self.command, WORKERS, self.given.out) as started:
            for line in started[0].lines(SECONDS):
                if done := re.fullmatch(r"epoch (\d+) done, .*", line):
                    self._epoch(int(done[1]), started)
                elif at := re.fullmatch(r"epoch (\d+), step (\d+) of (\d+)", line):
                    epoch, step, steps = map(int, at.groups())
                    self._step(epoch, step)
                    if epoch == killing and step >= steps // 2:
                        return self._kill(started, epoch, step, steps)
            for one in started:
                one.check(SECONDS)
        return None

    def _step(self, epoch, step):
        """Advance the bar by steps that were never taken before."""
        last_epoch, last_step = self._furthest
        if (epoch, step) > self._furthest:
            self.shown.side(epoch, self.compared.ours)
            for _ in range(step - (last_step if epoch == last_epoch else 0)):
                self.shown.step()
            self._furthest = epoch, step

    def _epoch(self, epoch, started):
        paths = [snapshot_path(self.given.out, epoch, i) for i in range(WORKERS)]
        for one, path in zip(started, paths, strict=True):
            one.wait_for(path, SECONDS)
        ours, *others = map(load_snapshot, paths)
        self.identical &= all(same_bits(ours, other) for other in others)
        self.compared.epochs.append([self.reference[epoch - 1], ours])
        self.shown.epoch()

    def _kill(self, started, epoch, step, steps):
        first, second = started
        first.kill()
        start = time.monotonic()
        self.shown.say(
            f"Worker 0 is killed in epoch {epoch}, after {step} of {steps} steps."
        )
        second.wait(SECONDS)
        seconds = time.monotonic() - start
        why = next(line for line in second.lines(0) if line.startswith("lost: "))
        self.shown.say(
            f"Worker 1 ends {seconds:.1f} s later: {why.removeprefix('lost: ')}",
            f"Both start again from the checkpoint after epoch {epoch - 1}."
            if epoch > 1
            else "Both start again from the beginning: there is no checkpoint yet.",
            "",
        )
        return seconds


def same_bits(one, other):
    """Whether two snapshots hold the same arrays."""
    return all(
        np.array_equal(array, other.arrays[quantity][name])
        for quantity, arrays in one.arrays.items()
        for name, array in arrays.items()
    )


def compare(command, given, data):
    """Train alone and on workers, show it all, and write the table.

    Args:
        command: list of strings that starts one worker.
        given: namespace of the command line.
        data: a `Data`.

    Returns:
        The exit status: 0 if all agree, 1 if not, 2 if a worker ended unasked.
    """
    for left in ("checkpoints", "snapshots"):
        shutil.rmtree(given.out / left, ignore_errors=True)
    compared = equivalence.Run(TITLE, "float64", "alone", ours="together")
    with report.Report() as shown:
        shown.say(
            "Alone: one process. Together: two workers, each with its half of every "
            "batch.",
            "",
        )
        steps = given.epochs * (len(data.x_train) // given.batch_size)
        shown.start(compared, 2 * steps)
        demo = Demo(shown, compared, command, given, data)
        try:
            demo.train_alone()
            lost = demo.train_together(killing=given.epochs // 2 + 1)
            demo.train_together()
        except WorkerError as error:
            shown.finish()
            print(error, file=sys.stderr)
            return 2
        shown.finish()
        shown.judgement([compared])
        said = good("yes") if demo.identical else bad("NO")
        shown.say(Text.assemble("Both workers have the same bits: ", said))
        equivalent = compared.equivalent() and demo.identical
        report.save_table(
            given.out / "table.json",
            [compared],
            given,
            equivalent=equivalent,
            workers_identical=demo.identical,
            seconds_until_noticed=lost,
        )
        return shown.verdict(
            equivalent, "Table, checkpoints and the workers' logs", given.out
        )


def options(add):
    add(
        "--apart",
        action="store_true",
        help="without synchronization, each worker by the statistics of its share",
    )


def main(argv=None):
    """Run the example, or one worker of it.

    Args:
        argv: list of arguments; None for those of the command line.

    Returns:
        The exit status.
    """
    argv = sys.argv[1:] if argv is None else argv
    given, data = digits.parse(__doc__, "out/multi_worker", argv, options)
    with equivalence.precision("float64"):
        if "TF_CONFIG" in os.environ:
            return worker(given, data)
        return compare([sys.executable, __file__, *argv], given, data)


if __name__ == "__main__":
    sys.exit(main())
