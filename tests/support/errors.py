"""The rule of the numeric tests: our error is at most a few times Keras's."""

import math

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

    It is one rounding, `unit`; on PyTorch, whose op adds up one row after another as
    `torch.nn.BatchNorm2d` does, the expected error of such a sum in float32.
    """
    if keras.backend.backend() != "torch":
        return unit
    return max(unit, math.sqrt(rows) * 2**-24)
