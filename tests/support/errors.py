"""The rule of the numeric tests: our error is at most a few times Keras's."""

import math
import os

import keras
import numpy as np


def assert_not_worse(errors, *, times=3, least=0.0, most=math.inf):
    """Our error is at most `times` that of a peer, in every quantity.

    Args:
        errors: a dict from quantity to `(ours, theirs)`, two errors against float64, or
            to a list of such pairs, one for each draw. Of several draws the means are
            compared, for a single error may be small by luck.
        times: how much larger ours may be.
        least: what the peer's error counts as at least, such as one rounding: below
            it, both are as good as exact.
        most: what our error must not exceed, however large the peer's is.
    """
    for quantity, pairs in errors.items():
        ours, theirs = np.mean(np.reshape(pairs, (-1, 2)), axis=0)
        # A peer that fails allows nothing.
        theirs = theirs if np.isfinite(theirs) else 0.0
        allowed = min(times * max(theirs, least), most)
        assert ours <= allowed, f"{quantity}: {ours:.2g}, allowed {allowed:.2g}"


def summed(unit, rows):
    """What to count as the least error where sums over `rows` rows are in the result.

    It is one rounding, `unit`. Where an op adds up one row after another, as PyTorch's
    does (and `torch.nn.BatchNorm2d`), and TensorFlow's on one core, it is the expected
    error of such a sum in float32.
    """
    backend = keras.backend.backend()
    in_turn = backend == "torch" or (backend == "tensorflow" and cores() == 1)
    if not in_turn:
        return unit
    return max(unit, math.sqrt(rows) * 2**-24)


def cores():
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count()
