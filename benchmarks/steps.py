"""Milliseconds of a step in `fit`, and what normalization costs of them."""

import time

import keras
import numpy as np

from benchmarks import applications


class StepTimes(keras.callbacks.Callback):
    """Seconds of each training step."""

    def on_train_begin(self, logs=None):
        self.times = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter() - self.start)


def measure(application, size, batch, rounds=5, steps=5, kinds=applications.KINDS):
    """What `summary` says of a model of each kind, fitted in turn in one process.

    A round before the others, which traces the models, isn't counted.
    """
    images = applications.data(size, batch)
    models = {k: applications.build(application, size, k) for k in kinds}
    times = {kind: [] for kind in models}
    for _ in range(rounds + 1):
        for kind, model in models.items():
            timer = StepTimes()
            model.fit(
                images,
                steps_per_epoch=steps,
                shuffle=False,
                verbose=0,
                callbacks=[timer],
            )
            times[kind].append(timer.times)
    return summary({kind: rounds[1:] for kind, rounds in times.items()})


def summary(times):
    """Medians of all steps, and the share of the first kind's cost that is left.

    For the usual kinds, the share is `(ours - without) / (Keras - without)`, of the
    medians of one round. On a shared machine it is off by about 0.1 either way, so its
    range is told too.

    Args:
        times: by kind, for each round a list of the seconds of its steps; of three
            kinds, in the order of `applications.KINDS` or `FROZEN_KINDS`.

    Returns:
        A dict: `ms` by kind, `share` (median over the rounds), `range` (lowest and
        highest share), and `shares` of all rounds.
    """
    ms = {kind: 1e3 * float(np.median(rounds)) for kind, rounds in times.items()}
    by_round = {kind: np.median(rounds, axis=1) for kind, rounds in times.items()}
    theirs, ours, without = by_round.values()
    shares = ((ours - without) / (theirs - without)).tolist()
    return {
        "ms": ms,
        "share": float(np.median(shares)),
        "range": [min(shares), max(shares)],
        "shares": shares,
    }


def cells(row):
    """Milliseconds of each kind, and the share, as text."""
    low, high = row["range"]
    share = f"{row['share']:.2f} ({low:.2f} to {high:.2f})"
    return [*(f"{ms:.0f}" for ms in row["ms"].values()), share]
