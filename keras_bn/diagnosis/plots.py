"""The figure of a diagnosis, with the layers from top to bottom."""

import numpy as np

from keras_bn.diagnosis.findings import WORST_MEAN_DRIFT, WORST_STDDEV_RATIO
from keras_bn.diagnosis.rules import SEVERITIES
from keras_bn.pages.plain import escaped

# As on the pages.
COLORS = {"error": "#c1272d", "warning": "#b65c00", "note": "#2f6690"}
HEALTHY, QUIET = "#2f7a3a", "#5f6b76"
# What is beyond is drawn at the edge, so that one channel doesn't squeeze the others.
MEAN_LIMIT = 4.0
_RATIO_LIMIT = 16.0
GAP_LIMIT = 2.0
# The height of a row in inches, and with many rows.
_ROW, _LOW_ROW, _MANY = 0.45, 0.28, 20


def draw(record, findings):
    """Draw a diagnosis.

    Args:
        record: a `ModelRecord`.
        findings: its list of `Finding`.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure

    depth = len(record.layers)
    height = 2.6 + (_ROW if depth <= _MANY else _LOW_ROW) * max(depth, 3)
    figure = Figure(figsize=(14, height), layout="constrained")
    mean, ratio, gap, words = figure.subplots(
        1, 4, sharey=True, width_ratios=(3, 3, 2.2, 3)
    )
    figure.suptitle(
        _title(record, findings), x=0.01, ha="left", weight="bold", parse_math=False
    )
    colors = [_color(layer.layer, findings) for layer in record.layers]
    _means(mean, record.layers, colors)
    _ratios(ratio, record.layers, colors)
    _gaps(gap, record, colors)
    _words(words, record, findings)
    names = [*(_name(layer.layer) for layer in record.layers), "output"]
    mean.set_yticks(range(depth + 1), names, parse_math=False)
    mean.set_ylim(depth + 0.6, -0.6)
    mean.set_ylabel("layers, in the order the data passes them")
    figure.supxlabel(
        "Each dot is a channel (an arrowhead: off the scale), each black bar the "
        "median of a layer. In the green band a channel counts as healthy.",
        fontsize=10,
        color=QUIET,
    )
    return figure


def _title(record, findings):
    counts = {s: sum(f.severity == s for f in findings) for s in SEVERITIES}
    parts = [f"{n} {s}{'s' * (n > 1)}" for s, n in counts.items() if n]
    title = f"{escaped(record.model)}: {', '.join(parts) or 'healthy'}"
    both = [
        f"{name} {form.format(pair[0])} in inference, {form.format(pair[1])} with the "
        "statistics of each batch"
        for name, form, pair in (
            ("loss", "{:.3g}", record.loss),
            ("accuracy", "{:.1%}", record.accuracy),
        )
        if pair is not None
    ]
    return "\n".join([title, *both])


def _means(axis, layers, colors):
    _head(axis, "Moving mean, off the data's by")
    axis.axvspan(-WORST_MEAN_DRIFT, WORST_MEAN_DRIFT, color=HEALTHY, alpha=0.08)
    drifts = [layer.mean_drift for layer in layers]
    limit = mean_limit(drifts)
    for row, (drift, color) in enumerate(zip(drifts, colors, strict=True)):
        _dots(axis, row, drift, color, -limit, limit)
    axis.set_xlim(-1.08 * limit, 1.08 * limit)
    axis.set_xlabel("standard deviations of the data")
    _tidy(axis)


def _ratios(axis, layers, colors):
    _head(axis, "Moving std / the data's")
    axis.axvspan(1 / WORST_STDDEV_RATIO, WORST_STDDEV_RATIO, color=HEALTHY, alpha=0.08)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.log2(layer.stddev_ratio) for layer in layers]
    limit = 2 ** ratio_limit(logs)
    for row, (log, color) in enumerate(zip(logs, colors, strict=True)):
        _dots(axis, row, 2**log, color, 1 / limit, limit)
    axis.set_xlim(1 / (1.08 * limit), 1.08 * limit)
    scale_ratios(axis.xaxis, limit)
    axis.set_xlabel("too small  ←  ratio  →  too large")
    _tidy(axis)


def _dots(axis, row, values, color, low, high):
    """The channels of a layer as dots, spread over their row, and their median."""
    values = np.ravel(values)
    finite = values[np.isfinite(values)]
    axis.axhline(row, color="#ddd", lw=0.8, zorder=0)
    if finite.size < values.size:
        lost = values.size - finite.size
        text = f"{lost} of {values.size} not finite"
        axis.annotate(
            text,
            (high, row - 0.2),
            ha="right",
            va="bottom",
            color=COLORS["error"],
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0},
        )
    if not finite.size:
        return
    scatter = np.random.default_rng(row).uniform(-0.24, 0.24, finite.size)
    inside = np.clip(finite, low, high)
    beyond = inside != finite
    alpha = np.clip(60 / finite.size, 0.25, 0.8)
    style = {"color": color, "alpha": alpha, "linewidths": 0}
    axis.scatter(inside[~beyond], row + scatter[~beyond], s=16, **style)
    for edge, marker in ((low, "<"), (high, ">")):
        at = beyond & (inside == edge)
        axis.scatter(inside[at], row + scatter[at], s=30, marker=marker, **style)
    median = np.clip(np.median(finite), low, high)
    axis.plot([median, median], [row - 0.34, row + 0.34], color="black", lw=2)


def _gaps(axis, record, colors):
    _head(axis, "Output gap")
    gaps = [*(layer.gap for layer in record.layers), record.gap]
    colors = [*colors, "#444"]
    finite = [gap if np.isfinite(gap) else 0.0 for gap in gaps]
    limit = float(np.clip(max(finite), 1.0, GAP_LIMIT))
    widths = np.minimum(finite, limit)
    axis.barh(range(len(gaps)), widths, height=0.55, color=colors, alpha=0.8)
    for row, (gap, width) in enumerate(zip(gaps, widths, strict=True)):
        text = f" {gap:.2f}" if np.isfinite(gap) else " not finite"
        if gap > limit:  # the bar ends in an arrowhead
            axis.plot(limit, row, ">", color=colors[row], ms=11, clip_on=False)
            text = f"  {text}"
        axis.text(width, row, text, va="center", fontsize=9)
    axis.set_xlim(0, 1.3 * limit)
    axis.set_xlabel("training − inference, RMS / spread")
    _tidy(axis)


def _words(axis, record, findings):
    _head(axis, "Findings")
    axis.set_axis_off()
    rows = [*(layer.layer for layer in record.layers), record.model]
    for row, name in enumerate(rows):
        present = [f for f in findings if f.layer == name]
        if row < len(record.layers) and not present:
            axis.text(0, row, "healthy", va="center", color=HEALTHY)
        elif present:
            kinds = list(dict.fromkeys(f.kind for f in present))
            text = kinds[0] if len(kinds) == 1 else f"{kinds[0]}, {kinds[1]}"
            if len(kinds) > 2:
                text += f" + {len(kinds) - 2}"
            color = _color(name, findings)
            axis.text(0, row, text, va="center", color=color, fontsize=9)


def _head(axis, title):
    axis.set_title(title, loc="left", fontsize=12)


def _color(layer, findings):
    severities = {f.severity for f in findings if f.layer == layer}
    return next((COLORS[s] for s in SEVERITIES if s in severities), HEALTHY)


def mean_limit(drifts):
    """The limit of the axis for the drifts of the means."""
    return _limit(drifts, 1.5 * WORST_MEAN_DRIFT, MEAN_LIMIT)


def ratio_limit(logs):
    """The limit of the axis for base-2 logarithms of ratios of deviations."""
    return _limit(logs, np.log2(3.0), np.log2(_RATIO_LIMIT))


def scale_ratios(axis, limit):
    """Make an axis of ratios logarithmic, with ticks that can be read as such.

    Args:
        axis: an `Axis` of matplotlib.
        limit: the largest ratio on it, 2 or more; the smallest is 1 over it.
    """
    from matplotlib.ticker import NullLocator

    ticks = [2.0**k for k in range(-10, 11) if 1 / limit <= 2.0**k <= limit]
    labels = [f"1/{round(1 / t)}" if t < 1 else f"{t:g}" for t in ticks]
    scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    scale("log", base=2)
    axis.set_ticks(ticks, labels)
    axis.set_minor_locator(NullLocator())


def _limit(values, least, most):
    finite = np.concatenate([np.ravel(v)[np.isfinite(np.ravel(v))] for v in values])
    return float(np.clip(np.abs(finite).max(initial=0.0), least, most))


def _name(path):
    path = escaped(path)
    return path if len(path) <= 34 else "…" + path[-33:]


def _tidy(axis):
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)
