"""Accuracy under stress: at most three times the error of the better of two peers."""

import accuracy
import pytest

# Sums of this many terms, one after another, are where kernels differ most.
LARGE = [row for row in accuracy.ROWS if "elements" in row]


@pytest.mark.parametrize("row", accuracy.ROWS)
def test_error_is_at_most_three_times_the_better_peers(row):
    errors = accuracy.measure(row)
    for quantity in accuracy.QUANTITIES:
        allowed = 3 * max(
            accuracy.peers_best(errors, quantity), accuracy.rounding_unit(row)
        )
        for mode in accuracy.MODES:
            if row == "std 1e18" and quantity in ("mean", "variance"):
                # Their sum of squares overflows: the peers' variance is lost for
                # good, ours keeps its old statistics.
                assert errors[mode][quantity] <= 1
            else:
                assert errors[mode][quantity] <= allowed, (mode, quantity)
