"""A figure of two trainings: their curves, and the difference between them."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

from common.training import FLOAT64_TOLERANCE, OURS, QUANTITIES

COLORS = {"float32": "#d1603d", "float64": "#2f6690"}


def save(path, runs):
    """Draw one model's run in float32 and in float64.

    Args:
        path: of the PNG.
        runs: list of two `Run`.
    """
    figure, axes = plt.subplot_mosaic(
        [["loss"] * 3 + ["accuracy"] * 3, [q for q in QUANTITIES for _ in range(2)]],
        figsize=(11, 8),
        layout="constrained",
    )
    run, reference = runs[0], runs[0].reference
    figure.suptitle(f"{run.title}\n{reference} and {OURS}", weight="bold")
    _curves(axes["loss"], run, "loss", "Training loss", "upper right")
    axes["loss"].set_ylim(bottom=0)
    _curves(axes["accuracy"], run, "val_accuracy", "Validation accuracy", "lower right")
    axes["accuracy"].yaxis.set_major_formatter(PercentFormatter(1))
    first = axes[QUANTITIES[0]]
    for quantity in QUANTITIES:
        if axes[quantity] is not first:
            axes[quantity].sharey(first)
        _differences(axes[quantity], runs, quantity)
    first.set_ylabel(f"largest difference, {reference} and {OURS}")
    lines, labels = first.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(axis, run, value, title, legend):
    epochs = range(1, len(run.epochs) + 1)
    reference, ours = (
        [getattr(snapshots[side], value) for snapshots in run.epochs] for side in (0, 1)
    )
    axis.plot(
        epochs, reference, "o-", color="#f2b134", lw=7, ms=11, label=run.reference
    )
    axis.plot(epochs, ours, "o-", color="#22333b", lw=1.5, ms=5, label=OURS)
    axis.set_title(f"{title}, {run.dtype}")
    axis.legend(frameon=False, loc=legend)
    _tidy(axis)


def _differences(axis, runs, quantity):
    limits = {
        "float32": f"allowed: twice {runs[0].reference} against itself, rows reordered",
        "float64": f"allowed: {FLOAT64_TOLERANCE:.0e}",
    }
    for run in runs:
        epochs = range(1, len(run.epochs) + 1)
        color = COLORS[run.dtype]
        found = [d[quantity].value for d in run.differences()]
        allowed = [a[quantity] for a in run.allowed()]
        axis.plot(epochs, found, "o-", color=color, label=run.dtype)
        axis.plot(epochs, allowed, "_--", color=color, label=limits[run.dtype])
    axis.set_yscale("log", nonpositive="clip")
    axis.set_title(f"Difference in {quantity}")
    _tidy(axis)


def _tidy(axis):
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
