"""The picture of the README: a sick model before and after `keras_bn.recalibrate`.

    python docs/pictures/recalibrated.py

The model is that of docs/tutorial.md, whose code it runs as far as the diagnosis.
"""

import os
import re
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import keras_bn
from keras_bn.diagnosis.findings import WORST_MEAN_DRIFT, WORST_STDDEV_RATIO

HERE = Path(__file__).parent
BEFORE, AFTER, QUIET, HEALTHY = "#c1272d", "#2f7a3a", "#8a949d", "#3a7d44"


def tutorial():
    """What the names of the tutorial's first two blocks stand for."""
    text = (HERE.parent / "tutorial.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[:2]:
        exec(block, names)
    return names


def accuracy(model, names):
    return model.evaluate(names["x_test"], names["y_test"], verbose=0)[1]


def draw(trained, before, after):
    """The figure, of the accuracy in training and two of (accuracy, report)."""
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    bars, mean, ratio = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.15))
    figure.suptitle("The same weights, before and after keras_bn.recalibrate(model, x)")
    shares = [trained, before[0], after[0]]
    bars.barh(range(3), shares, color=[QUIET, BEFORE, AFTER], height=0.6)
    bars.set_yticks(range(3), ["training", "evaluated\nbefore", "evaluated\nafter"])
    for row, share in enumerate(shares):
        bars.text(share - 0.03, row, f"{share:.0%}", va="center", ha="right", color="w")
    bars.set_title("Accuracy")
    bars.set_xlim(0, 1)
    bars.set_xticks([])

    channels = [
        (
            np.concatenate([np.ravel(x.mean_drift) for x in report.record.layers]),
            np.concatenate([np.ravel(x.stddev_ratio) for x in report.record.layers]),
        )
        for _, report in (before, after)
    ]
    for axis, which, healthy, title, label, note in (
        (
            mean,
            0,
            (-WORST_MEAN_DRIFT, WORST_MEAN_DRIFT),
            "Moving mean, off the data's by",
            "standard deviations",
            "Each dot is a channel",
        ),
        (
            ratio,
            1,
            (1 / WORST_STDDEV_RATIO, WORST_STDDEV_RATIO),
            "Moving std / the data's",
            "ratio",
            "One outside the green is enough",
        ),
    ):
        axis.axvspan(*healthy, color=HEALTHY, alpha=0.12, lw=0)
        for row, (values, color) in enumerate(
            zip(channels, (BEFORE, AFTER), strict=True)
        ):
            scatter = np.random.default_rng(row).uniform(-0.2, 0.2, values[which].size)
            axis.scatter(
                values[which], row + 1 + scatter, color=color, s=22, alpha=0.6, lw=0
            )
        axis.text(0.5, 0.83, note, transform=axis.transAxes, ha="center", color="#555")
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_yticks([])
        axis.grid(axis="x", alpha=0.25)
    ratio.set_xscale("log", base=2)
    ratio.set_xlim(0.4, 2.5)
    ratio.set_xticks([0.5, 1, 2], ["1/2", "1", "2"])
    for axis in (bars, mean, ratio):
        axis.set_ylim(2.5, -0.5)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    return figure


def main():
    os.chdir(tempfile.mkdtemp())  # for what the tutorial writes
    names = tutorial()
    model = names["model"]
    before = accuracy(model, names), names["report"]
    data = names["x_train"], names["y_train"]
    keras_bn.recalibrate(model, names["x_train"], verbose=0)
    after = accuracy(model, names), keras_bn.diagnose(model, data)
    draw(names["trained"], before, after).savefig(HERE / "recalibrated.png", dpi=130)


if __name__ == "__main__":
    main()
