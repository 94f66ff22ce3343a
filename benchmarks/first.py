"""Seconds to the end of the first step, each in a process of its own.

Who trains a model waits for this once, and in the process that traced it before, a
second model would start faster than theirs.
"""

import time

import numpy as np

from benchmarks import applications, markdown, process
from keras_bn import verify

CALLS = ("fit", "evaluate", "predict")
KINDS = (verify.PEER, verify.OURS)


def seconds(kind, application, size, batch, of="fit", jit=False):
    """Seconds of a first step here and now; model and data are made before.

    Args:
        kind, application, size, jit: as for `applications.build`.
        batch: size of the batch.
        of: the method that takes the step, one of `CALLS`.
    """
    model = applications.build(application, size, kind, jit)
    images = applications.data(size, batch)
    how = {"steps_per_epoch": 1, "shuffle": False} if of == "fit" else {"steps": 1}
    start = time.perf_counter()
    getattr(model, of)(images, verbose=0, **how)
    return time.perf_counter() - start


def measure(
    application,
    size,
    batch,
    of="fit",
    jit=False,
    rounds=3,
    kinds=KINDS,
    number=process.number,
):
    """One row: medians over rounds of fresh processes, of two kinds in turn.

    `ratio` is the second over the first, ours over Keras's, of the medians.
    `number(module, *arguments)` gives what a process prints.
    """
    where = ["--application", application, "--size", size, "--batch", batch]
    how = ["--of", of, *(["--jit"] if jit else [])]
    times = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            seconds = number("benchmarks.models", "--first", kind, *where, *how)
            times[kind].append(seconds)
    medians = {kind: float(np.median(seconds)) for kind, seconds in times.items()}
    return {
        "model": application,
        "size": size,
        "batch": batch,
        "of": of,
        "jit": jit,
        "seconds": medians,
        "rounds": times,
        "ratio": medians[kinds[1]] / medians[kinds[0]],
    }


def cells(row):
    """Seconds of both kinds, and the ratio, as text."""
    both = [f"{seconds:.1f}" for seconds in row["seconds"].values()]
    return [*both, f"{row['ratio']:.2f}"]


def table(rows):
    """The rows as a table in Markdown."""
    head = ["model", "first step of", "Keras, s", "ours, s", "ours / Keras"]
    calls = [f"`{r['of']}`{' under XLA' if r['jit'] else ''}" for r in rows]
    return markdown.table(
        head,
        [
            [applications.title(row), call, *cells(row)]
            for row, call in zip(rows, calls, strict=True)
        ],
    )
