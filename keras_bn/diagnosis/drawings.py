"""The drawing of a layer on a page: its channels on an axis."""

from typing import NamedTuple

import numpy as np

# At most this many channels of a layer are drawn, always with the outermost.
DOTS = 256
# The drawing of a layer, in its own units; it is scaled to its column.
WIDTH, HEIGHT, MARGIN = 240, 34, 8
# The gap that fills the bar.
FULL_GAP = 1.0


class Strip(NamedTuple):
    """The channels of a layer, placed on an axis.

    Args:
        healthy: the ends of the green band.
        dots, beyond: paths of SVG: the channels on the axis, and those off the scale as
            triangles at its ends.
        median: its place, or None if no channel is finite.
        lost: how many channels are not finite, in words; empty if all are.
        words: the median and the worst channel, in words.
        width, height: of the drawing.
    """

    healthy: tuple[float, float]
    dots: str
    beyond: str
    median: float | None
    lost: str
    words: str
    width: int = WIDTH
    height: int = HEIGHT


def strip(values, limit, healthy, seed, words=""):
    """Place the channels of a layer on an axis from -limit to limit.

    Args:
        values: an array of a number for each channel.
        limit: the end of the axis; channels beyond it are triangles at the edge.
        healthy: the end of the green band.
        seed: of the scatter of the dots.
        words: the numbers in words.

    Returns:
        A `Strip`.
    """
    values = np.ravel(values)
    finite = np.sort(values[np.isfinite(values)])
    lost = values.size - finite.size
    if finite.size > DOTS:
        finite = finite[np.linspace(0, finite.size - 1, DOTS).round().astype(int)]
    middle = HEIGHT / 2

    def at(value):
        clipped = np.clip(value / limit, -1, 1)
        return round(float(WIDTH / 2 + clipped * (WIDTH / 2 - MARGIN)), 1)

    scatter = np.random.default_rng(seed).uniform(-0.6, 0.6, finite.size) * middle
    inside = np.abs(finite) <= limit
    return Strip(
        healthy=(at(-healthy), at(healthy)),
        dots="".join(
            f"M{at(x)} {middle + dy:.1f}h0"
            for x, dy in zip(finite[inside], scatter[inside], strict=True)
        ),
        beyond="".join(
            f"M{at(x)} {middle + dy - 3:.1f}v6l{np.sign(x) * 5:.0f}-3z"
            for x, dy in zip(finite[~inside], scatter[~inside], strict=True)
        ),
        median=at(np.median(finite)) if finite.size else None,
        lost=f"{lost:,} of {values.size:,} not finite" if lost else "",
        words=words,
    )
