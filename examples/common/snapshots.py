"""Snapshots of a training in files, for another process to read."""

import numpy as np

from common.training import Snapshot
from keras_bn.tools.files import write_whole

FOLDER = "snapshots"
NUMBERS = ("loss", "accuracy", "val_accuracy", "seconds")


def path(folder, epoch, worker):
    """Where a worker's snapshot of an epoch is."""
    return folder / FOLDER / f"epoch_{epoch}_worker_{worker}.npz"


def save(file, snapshot):
    """Write a `Snapshot`, whole or not at all."""
    file.parent.mkdir(exist_ok=True)
    content = {name: getattr(snapshot, name) for name in NUMBERS}
    for quantity, arrays in snapshot.arrays.items():
        content |= {f"{quantity}: {name}": array for name, array in arrays.items()}
    write_whole(file, lambda part: np.savez(part, **content), force=True)


def load(file):
    """The `Snapshot` that `save` wrote."""
    arrays = {}
    with np.load(file) as content:
        numbers = {name: float(content[name]) for name in NUMBERS}
        for key in content.files:
            if key not in numbers:
                quantity, name = key.split(": ", 1)
                arrays.setdefault(quantity, {})[name] = content[key]
    return Snapshot(**numbers, arrays=arrays)
