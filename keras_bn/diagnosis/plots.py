"""The figure of a diagnosis, with the layers from top to bottom."""

import textwrap

import numpy as np

from keras_bn.diagnosis.findings import WORST_MEAN_DRIFT, WORST_STDDEV_RATIO
from keras_bn.diagnosis.rules import SEVERITIES

COLORS = {"error": "#c1272d", "warning": "#e07b00", "note": "#2f6690"}
HEALTHY = "#3a7d44"
# Points beyond are drawn at the edge, so that one channel doesn't squeeze the others.
_MEAN_LIMIT = 4.0
_RATIO_LIMIT = 16.0


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
    figure = Figure(figsize=(14, 2.6 + 0.45 * max(depth, 3)), layout="constrained")
    mean, ratio, gap, words = figure.subplots(
        1, 4, sharey=True, width_ratios=(3, 3, 2.2, 2.6)
    )
    figure.suptitle(_title(record, findings), x=0.01, ha="left", weight="bold")
    colors = [_color(layer.layer, findings) for layer in record.layers]
    _means(mean, record.layers, colors)
    _ratios(ratio, record.layers, colors)
    _gaps(gap, record, colors)
    _words(words, record, findings)
    mean.set_yticks(
        range(depth + 1), [*(_name(x.layer) for x in record.layers), "output"]
    )
    mean.set_ylim(depth + 0.6, -0.6)
    mean.set_ylabel("layers, in the order the data passes them")
    figure.supxlabel(
        "Each dot is a channel (an arrowhead: off the scale), each black bar the "
        "median of a layer. In the green band a channel counts as healthy.",
        fontsize=10,
        color="#555",
    )
    return figure


def _title(record, findings):
    counts = {s: sum(f.severity == s for f in findings) for s in SEVERITIES}
    said = [f"{n} {s}{'s' * (n > 1)}" for s, n in counts.items() if n]
    title = f"{record.model}: {', '.join(said) or 'healthy'}"
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
    axis.set_title("Moving mean, off the data's by")
    axis.axvspan(-WORST_MEAN_DRIFT, WORST_MEAN_DRIFT, color=HEALTHY, alpha=0.08)
    drifts = [layer.mean_drift for layer in layers]
    limit = mean_limit(drifts)
    for row, (drift, color) in enumerate(zip(drifts, colors, strict=True)):
        _dots(axis, row, drift, color, -limit, limit, 0.0)
    axis.set_xlim(-1.08 * limit, 1.08 * limit)
    axis.set_xlabel("standard deviations of the data")
    _tidy(axis)


def _ratios(axis, layers, colors):
    axis.set_title("Moving standard deviation / the data's")
    axis.axvspan(1 / WORST_STDDEV_RATIO, WORST_STDDEV_RATIO, color=HEALTHY, alpha=0.08)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.log2(layer.stddev_ratio) for layer in layers]
    limit = 2 ** ratio_limit(logs)
    axis.set_xscale("log", base=2)
    for row, (log, color) in enumerate(zip(logs, colors, strict=True)):
        _dots(axis, row, 2**log, color, 1 / limit, limit, 1.0)
    axis.set_xlim(1 / (1.08 * limit), 1.08 * limit)
    ticks = [
        t
        for t in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)
        if 1 / limit <= t <= limit
    ]
    labels = [f"1/{round(1 / t)}" if t < 1 else f"{t:g}" for t in ticks]
    axis.set_xticks(ticks, labels)
    axis.minorticks_off()
    axis.set_xlabel("too small  ←  ratio  →  too large")
    _tidy(axis)


def _dots(axis, row, values, color, low, high, agreed):
    """The channels of a layer as dots, spread over their row, and their median."""
    values = np.ravel(values)
    finite = values[np.isfinite(values)]
    axis.axhline(row, color="#ddd", lw=0.8, zorder=0)
    if finite.size < values.size:
        lost = values.size - finite.size
        text = f"{lost} of {values.size} not finite"
        axis.annotate(
            text,
            (high, row),
            ha="right",
            va="bottom",
            color=COLORS["error"],
            fontsize=8,
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
    axis.set_title("Output gap: training, inference")
    gaps = [*(layer.gap for layer in record.layers), record.gap]
    widths = [gap if np.isfinite(gap) else 0.0 for gap in gaps]
    axis.barh(range(len(gaps)), widths, height=0.55, color=[*colors, "#444"], alpha=0.8)
    widest = max(widths) or 1.0
    for row, gap in enumerate(gaps):
        text = f" {gap:.2f}" if np.isfinite(gap) else " not finite"
        axis.text(widths[row], row, text, va="center", fontsize=9)
    axis.set_xlim(0, max(1.0, 1.25 * widest))
    axis.set_xlabel("RMS difference / spread of the output")
    _tidy(axis)


def _words(axis, record, findings):
    axis.set_title("Findings", loc="left")
    axis.set_axis_off()
    rows = [*(layer.layer for layer in record.layers), record.model]
    for row, name in enumerate(rows):
        mine = [f for f in findings if f.layer == name]
        if row < len(record.layers) and not mine:
            axis.text(0, row, "healthy", va="center", color=HEALTHY)
        elif mine:
            text = textwrap.fill(", ".join(f.kind for f in mine), 34)
            axis.text(0, row, text, va="center", color=_color(name, findings))


def _color(layer, findings):
    severities = {f.severity for f in findings if f.layer == layer}
    return next((COLORS[s] for s in SEVERITIES if s in severities), HEALTHY)


def mean_limit(drifts):
    """The limit of the axis for the drifts of the means."""
    return _limit(drifts, 1.5 * WORST_MEAN_DRIFT, _MEAN_LIMIT)


def ratio_limit(logs):
    """The limit of the axis for base-2 logarithms of ratios of deviations."""
    return _limit(logs, np.log2(3.0), np.log2(_RATIO_LIMIT))


def _limit(values, least, most):
    finite = np.concatenate([np.ravel(v)[np.isfinite(np.ravel(v))] for v in values])
    return float(np.clip(np.abs(finite).max(initial=0.0), least, most))


def _name(path):
    return path if len(path) <= 28 else "…" + path[-27:]


def _tidy(axis):
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)
