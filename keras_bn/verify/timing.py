"""Timing functions in turn, so that a disturbance affects all of them.

Absolute times say little on a shared machine. The ratio of two medians, measured in
turn, says which is faster and by how much.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# Smaller ratios than this count as equal.
MARGIN = 1.05


class Timing(NamedTuple):
    """Milliseconds of one thing over many rounds: median and quartiles."""

    median: float
    low: float
    high: float
    rounds: int


def interleave(
    functions: dict[str, Callable[[], Any]], seconds: float, rounds: int = 7
) -> dict[str, Timing]:
    """Time functions in turn, so that a disturbance affects all of them.

    Args:
        functions: by name, each of no arguments; they need not be warm.
        seconds: total time for all together.
        rounds: the least number of rounds.

    Returns:
        A `Timing` for each name.

    >>> sorted(interleave({"a": lambda: None, "b": lambda: None}, 0.01))
    ['a', 'b']
    """
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        function()
        function()
        repeats[name] = max(1, int(0.02 / max(_time(function, 1), 1e-6)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[name]) < rounds:
        for name, function in functions.items():
            times[name].append(1e3 * _time(function, repeats[name]))
    return {name: _timing(rounds) for name, rounds in times.items()}


def _timing(times):
    median, low, high = (float(np.quantile(times, q)) for q in (0.5, 0.25, 0.75))
    return Timing(median, low, high, rounds=len(times))


def _time(function, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def verdict(ratio: float) -> str:
    """A ratio of medians, Keras's time over ours, in words.

    >>> verdict(2.0), verdict(1.0), verdict(0.5)
    ('2.0 times as fast', 'as fast', 'SLOWER: 0.50 times as fast')
    """
    if ratio >= MARGIN:
        return f"{ratio:.1f} times as fast"
    return "as fast" if ratio > 1 / MARGIN else f"SLOWER: {ratio:.2f} times as fast"
