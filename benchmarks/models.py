"""Whole models, trained as users train them: the first step, and those after it.

    python -m benchmarks.models                     four models, 8 minutes
    python -m benchmarks.models --full              and all else, 22 minutes
    python -m benchmarks.models --application ResNet50 --size 96
    python -m benchmarks.models --application ResNet50 --of predict
    python -m benchmarks.models --frozen            frozen statistics, 6 minutes

`--of predict` measures first steps alone.
"""

import argparse
import json
from pathlib import Path

from benchmarks import applications, first, frozen, markdown, process, steps


def measure(application, size, batch, rounds=3, fits=5):
    """One row: the first step of `fit`, and the steps after it.

    Args:
        application, size, batch: the model, as in `applications.FULL`.
        rounds: how many fresh processes of each kind for the first step.
        fits: how often each model is fitted for the steps after it.
    """
    where = application, size, batch
    return {
        "model": application,
        "size": size,
        "batch": batch,
        "first": first.measure(*where, rounds=rounds),
        **steps.measure(*where, rounds=fits),
    }


def other_first_steps(rounds=3, number=process.number):
    """Rows of `first.measure` for everything but `fit` in graph mode."""
    rows = [
        first.measure(*model, of=of, rounds=rounds, number=number)
        for of in ("evaluate", "predict")
        for model in applications.USUAL
    ]
    # One model alone, for XLA takes long to compile it.
    compiled = first.measure(
        *applications.USUAL[0], jit=True, rounds=rounds, number=number
    )
    return [*rows, compiled]


def table(rows):
    """The rows of `measure` as a table in Markdown."""
    head = ["model", "first step, Keras, s", "ours, s", "ours / Keras"]
    head += ["step, Keras, ms", "ours, ms", "without, ms"]
    head += ["share of the cost left (range)"]
    return markdown.table(
        head,
        [
            [applications.title(r), *first.cells(r["first"]), *steps.cells(r)]
            for r in rows
        ],
    )


def parsed(argv=None):
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--first",
        choices=(*first.KINDS, *applications.FROZEN_KINDS),
        metavar="KIND",
        help="take one first step here, and print its seconds alone",
    )
    parser.add_argument("--application", metavar="NAME", help="this model alone")
    parser.add_argument("--size", type=int, default=96, help="side of its images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--of", choices=first.CALLS, default="fit", help="what takes the first step"
    )
    parser.add_argument("--jit", action="store_true", help="under XLA")
    parser.add_argument(
        "--rounds", type=int, default=3, help="fresh processes for each first step"
    )
    parser.add_argument(
        "--fits", type=int, default=5, help="rounds of `fit` for the steps after it"
    )
    parser.add_argument("--full", action="store_true", help="all models, all calls")
    parser.add_argument(
        "--frozen", action="store_true", help="fine-tuning with frozen statistics"
    )
    parser.add_argument(
        "--memory",
        choices=applications.FROZEN_KINDS,
        metavar="KIND",
        help="take a step here, and print its peak of memory in bytes",
    )
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    if (arguments.first or arguments.memory) and not arguments.application:
        parser.error("--first needs --application, and so does --memory")
    return arguments


def main(argv=None):
    a = parsed(argv)
    if a.memory:
        print(frozen.peak(a.memory, a.application, a.size, a.batch))
        return
    if a.first:
        print(first.seconds(a.first, a.application, a.size, a.batch, a.of, a.jit))
        return
    chosen = applications.FULL if a.full else applications.USUAL
    if a.application:
        chosen = [(a.application, a.size, a.batch)]
    if a.frozen:
        if not a.application and not a.full:
            chosen = applications.QUICK
        rows = [frozen.measure(*model, a.rounds, a.fits) for model in chosen]
        print(frozen.table(rows))
    elif a.jit or a.of != "fit":
        rows = [first.measure(*m, a.of, a.jit, a.rounds) for m in chosen]
        print(first.table(rows))
    else:
        rows = [measure(*model, a.rounds, a.fits) for model in chosen]
        print(table(rows))
        if a.full:
            others = other_first_steps(a.rounds)
            print(first.table(others))
            rows += others
    if a.json:
        Path(a.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
