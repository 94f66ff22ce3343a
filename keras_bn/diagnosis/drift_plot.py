"""The figure of a `StatisticsLogger`: a line per layer over the epochs."""

import numpy as np

from keras_bn.diagnosis.findings import TYPICAL_MEAN_DRIFT, TYPICAL_STDDEV_RATIO
from keras_bn.diagnosis.plots import (
    GAP_LIMIT,
    HEALTHY,
    MEAN_LIMIT,
    QUIET,
    scale_ratios,
)

# With more layers than this, a color shows the depth, and there is no legend.
_NAMED = 10


def draw(rows):
    """Draw how the statistics of each layer drift.

    Args:
        rows: a list of `DriftRow`; the model's own rows have no drift.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = sorted(rows, key=lambda row: row.epoch)
    names = list(dict.fromkeys(row.layer for row in rows))
    # The last row of an epoch is the model's.
    layers = [name for name in names if name != rows[-1].layer]
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    mean, ratio, gap = figure.subplots(1, 3)
    colors = colormaps["viridis"](np.linspace(0, 0.92, max(len(layers), 2)))
    for name, color in zip(layers, colors, strict=False):
        history = [row for row in rows if row.layer == name]
        epochs = [row.epoch for row in history]
        for axis, typical, worst in (
            (
                mean,
                [r.mean_drift for r in history],
                [r.worst_mean_drift for r in history],
            ),
            (
                ratio,
                _stddev([r.log_variance_ratio for r in history]),
                _stddev([r.worst_log_variance_ratio for r in history]),
            ),
        ):
            axis.plot(epochs, typical, color=color, lw=2, label=name)
            axis.plot(epochs, worst, color=color, lw=1, ls=":", alpha=0.8)
        gap.plot(epochs, [r.output_gap for r in history], color=color, lw=2)
    whole = [row for row in rows if row.layer == rows[-1].layer]
    epochs = [row.epoch for row in whole]
    gap.plot(epochs, [row.output_gap for row in whole], color="black", lw=2.5)
    last = epochs[-1], min(whole[-1].output_gap, GAP_LIMIT)
    gap.annotate(" output", last, va="center", weight="bold")

    mean.axhspan(0, TYPICAL_MEAN_DRIFT, color=HEALTHY, alpha=0.1, lw=0)
    ratio.axhspan(
        1 / TYPICAL_STDDEV_RATIO, TYPICAL_STDDEV_RATIO, color=HEALTHY, alpha=0.1, lw=0
    )
    ratio.axhline(1, color="#888", lw=0.8)
    limit = _largest(line.get_ydata() for line in ratio.get_lines())
    scale_ratios(ratio.yaxis, limit)
    ratio.set_ylim(1 / (1.08 * limit), 1.08 * limit)
    _mark_beyond(ratio, 1 / limit, limit)
    for axis, least, most in (
        (mean, TYPICAL_MEAN_DRIFT, MEAN_LIMIT),
        (gap, 0.01, GAP_LIMIT),
    ):
        values = np.concatenate([line.get_ydata() for line in axis.get_lines()])
        largest = values[np.isfinite(values)].max(initial=0.0)
        limit = float(np.clip(largest, least, most))
        axis.set_ylim(0, 1.08 * limit)
        _mark_beyond(axis, 0, limit)
    for axis, title, label in (
        (mean, "Moving mean, off the data's by", "standard deviations of the data"),
        (ratio, "Moving std / the data's", "ratio"),
        (gap, "Output gap", "training − inference, RMS / spread"),
    ):
        axis.set_title(title, loc="left", fontsize=12)
        axis.set_ylabel(label)
        axis.set_xlabel("epochs done")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if len(layers) <= _NAMED:
        legend = figure.legend(
            *mean.get_legend_handles_labels(), loc="outside right center"
        )
        for name in legend.get_texts():
            name.set_parse_math(False)
    else:
        from matplotlib.cm import ScalarMappable

        bar = figure.colorbar(
            ScalarMappable(cmap="viridis"), ax=gap, ticks=[0, 1], pad=0.12
        )
        bar.ax.set_yticklabels(["first\nlayer", "last\nlayer"])
    figure.supxlabel(
        "Solid: the median channel of a layer, healthy in the green band. Dotted: the "
        "worst channel. An arrowhead: off the scale.",
        fontsize=10,
        color=QUIET,
    )
    return figure


def _largest(lines):
    """The limit of an axis for lines of ratios: from 2 to 16."""
    values = np.concatenate([np.asarray(line, "float64") for line in lines])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.abs(np.log2(values))
    return 2 ** float(np.clip(logs[np.isfinite(logs)].max(initial=0.0), 1.0, 4.0))


def _mark_beyond(axis, low, high):
    """Put an arrowhead at the edge for what is off the scale."""
    for line in axis.get_lines():
        x, y = np.array(line.get_xdata()), np.array(line.get_ydata(), "float64")
        style = {"color": line.get_color(), "s": 30, "linewidths": 0}
        for edge, marker, beyond in ((low, "v", y < low), (high, "^", y > high)):
            axis.scatter(x[beyond], np.full(beyond.sum(), edge), marker=marker, **style)


def _stddev(logs):
    """Ratios of standard deviations from logarithms of ratios of variances."""
    return np.exp(np.array(logs) / 2)
