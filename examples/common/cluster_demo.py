"""Two workers beside one process: one is killed, both resume, all are compared."""

import re
import shutil
import sys
import time

import numpy as np
from rich.text import Text

from common import results, snapshots, terminal, workers
from common.report import Report
from common.training import Run

COUNT = 2
# Importing TensorFlow takes its time, and so does noticing that a worker is gone.
SECONDS = 120


def run(title, alone, command, given, data):
    """Show it all in the terminal, and write the table as JSON.

    Args:
        title: what the table calls the model.
        alone: function of a tick, that trains in this process; see `train` in
            multi_worker.py.
        command: the script of a worker and its arguments.
        given: namespace of the command line.
        data: a `Data`.

    Returns:
        The exit status: 0 if all agree, 1 if not, 2 if a worker ended unasked.
    """
    for left in ("checkpoints", snapshots.FOLDER):
        shutil.rmtree(given.out / left, ignore_errors=True)
    compared = Run(title, "float64", "alone", ours="together")
    with Report() as shown:
        shown.say(
            "Alone: one process. Together: two workers, each with its half of every "
            "batch.",
            "",
        )
        shown.start(
            compared, 2 * given.epochs * (len(data.x_train) // given.batch_size)
        )
        demo = Demo(shown, compared, [sys.executable, *command], given)
        try:
            for _, snapshot in alone(demo.tick_alone):
                demo.reference.append(snapshot)
            lost = demo.train(killing=given.epochs // 2 + 1)
            demo.train()
        except workers.WorkerError as error:
            shown.finish()
            print(error, file=sys.stderr)
            return 2
        shown.finish()
        shown.judgement([compared])
        said = terminal.good("yes") if demo.identical else terminal.bad("NO")
        shown.say(Text.assemble("Both workers have the same bits: ", said))
        equivalent = compared.equivalent() and demo.identical
        results.save(
            given.out / "table.json",
            [compared],
            given,
            equivalent=equivalent,
            workers_identical=demo.identical,
            seconds_until_noticed=lost,
        )
        shown.written("Table, checkpoints and the workers' logs", given.out)
        return shown.verdict(equivalent)


class Demo:
    """The trainings, and what is known of them so far.

    Attributes:
        reference: list of the `Snapshot`s of the training in one process.
        identical: whether the workers had the same bits after every epoch.
    """

    def __init__(self, shown, compared, command, given):
        self.shown, self.compared = shown, compared
        self.command, self.given = command, given
        self.reference, self.identical = [], True
        self._furthest = (0, 0)

    def tick_alone(self, epoch, step, steps):
        if step == 1:
            self.shown.side(epoch, self.compared.reference)
        self.shown.step()

    def train(self, killing=None):
        """Have the workers train, to the end or until one of them is killed.

        Args:
            killing: the epoch in the middle of which the first worker is killed.

        Returns:
            With `killing`, after how many seconds the other worker gave up.
        """
        with workers.cluster(self.command, COUNT, self.given.out) as started:
            for line in started[0].lines(SECONDS):
                if done := re.fullmatch(r"epoch (\d+) done, .*", line):
                    self._epoch(int(done[1]), started)
                elif at := re.fullmatch(r"epoch (\d+), step (\d+) of (\d+)", line):
                    epoch, step, steps = map(int, at.groups())
                    self._step(epoch, step)
                    if epoch == killing and step >= steps // 2:
                        return self._kill(started, epoch, step, steps)
            for worker in started:
                worker.check(SECONDS)
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
        paths = [snapshots.path(self.given.out, epoch, i) for i in range(COUNT)]
        for worker, path in zip(started, paths, strict=True):
            worker.wait_for(path, SECONDS)
        ours, *others = map(snapshots.load, paths)
        self.identical &= all(same(ours, other) for other in others)
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


def same(one, other):
    """Whether two snapshots hold the same bits."""
    return all(
        np.array_equal(array, other.arrays[quantity][name])
        for quantity, arrays in one.arrays.items()
        for name, array in arrays.items()
    )
