"""What the figures have in common."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter
from PIL import Image

# The side a figure speaks for, what it is compared with, then others in this order.
WITH, WITHOUT = "#2f6690", "#d1603d"
COLORS = (WITH, WITHOUT, "#f2b134", "#3a7d44", "#7b5ea7", "#22333b")


def new_figure(title, mosaic, size=(11, 5), **options):
    """A figure that says in its title what there is to see.

    Args:
        title: the finding or the question, in one or two lines.
        mosaic: names of its axes, as for `plt.subplot_mosaic`.
        size: width and height, in units of 100 pixels.
        **options: further ones of `plt.subplot_mosaic`.

    Returns:
        `(figure, axes)`, axes being a dictionary by name.
    """
    figure, axes = plt.subplot_mosaic(
        mosaic, figsize=size, layout="constrained", **options
    )
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure, axes


def tidy(axis, title="", xlabel="", ylabel="", grid="y"):
    """Label an axis, and take off it what says nothing."""
    axis.set_title(title, loc="left", fontsize="medium")
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(axis=grid, alpha=0.25)
        axis.set_axisbelow(True)


def dots(axis, at, values, color, label=None):
    """One dot per seed beside each other at x = `at`, and a bar at their median."""
    values = np.asarray(values, float)
    beside = at + np.linspace(-0.12, 0.12, len(values))
    axis.plot(beside, values, "o", color=color, alpha=0.5, mew=0, label=label)
    axis.hlines(np.median(values), at - 0.25, at + 0.25, color=color, lw=3)


def save(figure, path):
    """Write a figure as a PNG of 256 colours, half the size of a full one."""
    figure.savefig(path, dpi=100)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    plt.close(figure)


def band(axis, x, values, color, label=None, **options):
    """A line at the median over seeds, in a band from the lowest to the highest.

    Args:
        axis: to draw on.
        x: positions of the columns of `values`.
        values: array of shape (seeds, positions).
        color: of both.
        label: for the legend.
        **options: of the line.
    """
    values = np.asarray(values, float)
    low, high = values.min(0), values.max(0)
    axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axis.plot(x, np.median(values, 0), "o-", color=color, label=label, **options)


def percent(axis, decimals=0, ticks=None):
    """Show the numbers of the upright axis, shares of 1, as percentages."""
    if ticks is not None:
        axis.set_yticks(ticks)
        axis.set_yticks([], minor=True)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals))


def images(axis, shown):
    """Grey images of one size in a row, black 0 and white 1."""
    row = [np.pad(image, 1, constant_values=np.nan) for image in shown]
    axis.imshow(np.concatenate(row, axis=1), cmap="gray", vmin=0, vmax=1)
    axis.axis("off")
