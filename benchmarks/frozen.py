"""Fine-tuning whole models with all statistics frozen, fused and not."""

import numpy as np

from benchmarks import applications, first, markdown, memory, process, steps
from benchmarks.applications import FROZEN, FROZEN_KINDS, FUSED


def measure(application, size, batch, rounds=3, fits=5, number=process.number):
    """One row: the first step of `fit`, the steps after it, and their memory.

    Args:
        application, size, batch: the model, as in `applications.FULL`.
        rounds: how many fresh processes of each kind for first step and memory.
        fits: how often each model is fitted for the steps after it.
        number: `number(module, *arguments)` gives what a process prints.
    """
    where = application, size, batch
    grown: dict = {kind: [] for kind in (FROZEN, FUSED)}
    for _ in range(rounds):
        for kind in grown:
            how = ["--application", application, "--size", size, "--batch", batch]
            grown[kind].append(number("benchmarks.models", "--memory", kind, *how))
    peaks = {kind: float(np.median(values)) for kind, values in grown.items()}
    kinds = FROZEN, FUSED
    return {
        "model": application,
        "size": size,
        "batch": batch,
        "first": first.measure(*where, rounds=rounds, kinds=kinds, number=number),
        "memory": {**peaks, "ratio": peaks[FUSED] / peaks[FROZEN]},
        **steps.measure(*where, rounds=fits, kinds=FROZEN_KINDS),
    }


def peak(kind, application, size, batch):
    """Bytes that a step takes at its peak beyond what was there before (Linux alone).

    A step with one image before it traces the model.
    """
    model = applications.build(application, size, kind)
    how = {"steps_per_epoch": 1, "shuffle": False, "verbose": 0}
    model.fit(applications.data(size, 1), **how)
    images = applications.data(size, batch)
    memory.forget_peak()
    before = memory.resident()
    model.fit(images, **how)
    return memory.resident(peak=True) - before


def table(rows):
    """The rows of `measure` as a table in Markdown."""
    head = ["model", "first step, frozen, s", "fused, s", "fused / frozen"]
    head += ["step, frozen, ms", "fused, ms", "without, ms"]
    head += ["share of the cost left (range)"]
    head += ["memory, frozen, MiB", "fused, MiB", "fused / frozen"]
    return markdown.table(
        head,
        [
            [
                applications.title(row),
                *first.cells(row["first"]),
                *steps.cells(row),
                *(f"{row['memory'][kind] / 2**20:.0f}" for kind in (FROZEN, FUSED)),
                f"{row['memory']['ratio']:.2f}",
            ]
            for row in rows
        ],
    )
