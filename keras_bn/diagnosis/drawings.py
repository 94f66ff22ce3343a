"""The drawing of a layer in HTML: its channels on an axis."""

import numpy as np

# At most this many channels of a layer are drawn, always with the outermost.
DOTS = 256
# The drawing of a layer, in its own units; it is scaled to its column.
WIDTH, HEIGHT, MARGIN = 240, 34, 8
# The gap that fills the bar.
FULL_GAP = 1.0


def strip(values, limit, healthy, seed):
    """The channels of a layer on an axis from -limit to limit, as inline SVG.

    Args:
        values: an array of a number for each channel.
        limit: the end of the axis; channels beyond it are triangles at the edge.
        healthy: the end of the green band.
        seed: of the scatter of the dots.
    """
    values = np.ravel(values)
    finite = np.sort(values[np.isfinite(values)])
    if finite.size > DOTS:
        finite = finite[np.linspace(0, finite.size - 1, DOTS).round().astype(int)]
    middle = HEIGHT / 2

    def at(value):
        clipped = np.clip(value / limit, -1, 1)
        return WIDTH / 2 + clipped * (WIDTH / 2 - MARGIN)

    scatter = np.random.default_rng(seed).uniform(-0.6, 0.6, finite.size) * middle
    inside = np.abs(finite) <= limit
    dots = "".join(
        f"M{at(x):.1f} {middle + dy:.1f}h0"
        for x, dy in zip(finite[inside], scatter[inside], strict=True)
    )
    beyond = "".join(
        f"M{at(x):.1f} {middle + dy - 3:.1f}v6l{np.sign(x) * 5:.0f}-3z"
        for x, dy in zip(finite[~inside], scatter[~inside], strict=True)
    )
    low, high = at(-healthy), at(healthy)
    parts = [
        f'<rect class="band" x="{low:.1f}" width="{high - low:.1f}" y="0" '
        f'height="{HEIGHT}"/>',
        f'<path class="zero" d="M{at(0):.1f} 0v{HEIGHT}"/>',
        f'<path class="dots" d="{dots}"/>' if dots else "",
        f'<path class="beyond" d="{beyond}"/>' if beyond else "",
    ]
    if finite.size:
        parts.append(
            f'<path class="median" d="M{at(np.median(finite)):.1f} 3v{HEIGHT - 6}"/>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="channels of the layer">{"".join(parts)}</svg>'
    )


def said(values, typical, worst, unit=""):
    """The numbers below a strip."""
    if lost := values.size - np.isfinite(values).sum():
        return f'<b class="error">{lost:,} of {values.size:,} not finite</b>'
    return f"typically {typical:.2f}, at worst {worst:.2f}{unit}"


def scale(low, middle, high):
    """The numbers of an axis, in the title of its column."""
    return f'<span class="scale"><i>{low}</i><i>{middle}</i><i>{high}</i></span>'
