"""The table of an equivalence example as JSON."""

import dataclasses
import json
import platform

import keras
import numpy as np
import tensorflow as tf

import keras_bn


def save(path, runs, arguments, **more):
    """Write everything the tables show, and what it was made with.

    Args:
        path: of the JSON file.
        runs: list of `Run`.
        arguments: namespace of the command line.
        **more: what else belongs into the table, beside what is there or in its place.
    """
    table = {
        "equivalent": all(run.equivalent() for run in runs),
        "settings": {
            name: getattr(arguments, name)
            for name in ("data", "epochs", "batch_size", "seed")
        },
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (np, tf, keras, keras_bn)},
        },
        "runs": [_run(run) for run in runs],
        **more,
    }
    path.write_text(json.dumps(table, indent=2) + "\n")


def _run(run):
    measured = zip(run.epochs, run.differences(), run.allowed(), strict=True)
    return {
        "model": run.title,
        "dtype": run.dtype,
        "reference": run.reference,
        "equivalent": run.equivalent(),
        "reloaded_identical": run.reloaded_identical,
        "epochs": [
            {
                "epoch": number,
                run.reference: _numbers(snapshots[0]),
                run.ours: _numbers(snapshots[1]),
                "differences": {q: dataclasses.asdict(d) for q, d in apart.items()},
                "allowed": allowed,
            }
            for number, (snapshots, apart, allowed) in enumerate(measured, start=1)
        ],
    }


def _numbers(snapshot):
    return {name: x for name, x in vars(snapshot).items() if name != "arrays"}
