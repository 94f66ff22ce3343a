"""The picture of the README: one model before and after `keras_bn.recalibrate`.

    python docs/pictures/recalibrated.py

The model and its data are those of docs/tutorial.md.
"""

from pathlib import Path

import keras
import numpy as np
from keras import layers
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import keras_bn
from keras_bn.diagnosis.findings import WORST_MEAN_DRIFT, WORST_STDDEV_RATIO

BEFORE, AFTER, QUIET, HEALTHY = "#c1272d", "#2f7a3a", "#8a949d", "#3a7d44"


def digits():
    """`(x, y)` for training and `(x, y)` for evaluation."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32")
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def build():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(name="bn_1"),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(name="bn_2"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def draw_accuracies(axis, accuracies):
    """Bars for the accuracy in training, evaluated before, evaluated after."""
    axis.barh(range(3), accuracies, color=[QUIET, BEFORE, AFTER], height=0.6)
    axis.set_yticks(range(3), ["training", "evaluated\nbefore", "evaluated\nafter"])
    for row, share in enumerate(accuracies):
        axis.text(share - 0.03, row, f"{share:.0%}", va="center", ha="right", color="w")
    axis.set_title("Accuracy")
    axis.set_xlim(0, 1)
    axis.set_xticks([])


def draw_channels(axis, before, after, healthy, note):
    """A dot for each channel, before and after, over the healthy range."""
    axis.axvspan(*healthy, color=HEALTHY, alpha=0.12, lw=0)
    for row, (values, color) in enumerate(((before, BEFORE), (after, AFTER)), start=1):
        values = np.concatenate([np.ravel(x) for x in values])
        scatter = np.random.default_rng(row).uniform(-0.2, 0.2, values.size)
        axis.scatter(values, row + scatter, color=color, s=22, alpha=0.6, lw=0)
    axis.text(0.5, 0.83, note, transform=axis.transAxes, ha="center", color="#555")
    axis.set_yticks([])
    axis.grid(axis="x", alpha=0.25)


def draw(accuracies, before, after):
    """The figure, of three accuracies and two lists of `LayerRecord`."""
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    figure.suptitle("The same weights, before and after keras_bn.recalibrate(model, x)")
    bars, mean, ratio = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.15))
    draw_accuracies(bars, accuracies)
    draw_channels(
        mean,
        [layer.mean_drift for layer in before],
        [layer.mean_drift for layer in after],
        (-WORST_MEAN_DRIFT, WORST_MEAN_DRIFT),
        "Each dot is a channel",
    )
    mean.set_title("Moving mean, off the data's by")
    mean.set_xlabel("standard deviations")
    draw_channels(
        ratio,
        [layer.stddev_ratio for layer in before],
        [layer.stddev_ratio for layer in after],
        (1 / WORST_STDDEV_RATIO, WORST_STDDEV_RATIO),
        "One outside the green is enough",
    )
    ratio.set_title("Moving std / the data's")
    ratio.set_xlabel("ratio")
    ratio.set_xscale("log", base=2)
    ratio.set_xlim(0.4, 2.5)
    ratio.set_xticks([0.5, 1, 2], ["1/2", "1", "2"])
    for axis in (bars, mean, ratio):
        axis.set_ylim(2.5, -0.5)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    return figure


def main():
    keras.utils.set_random_seed(1)
    (x, y), test = digits()
    model = build()
    history = model.fit(x, y, batch_size=64, epochs=3, verbose=0).history
    accuracies = [history["accuracy"][-1], model.evaluate(*test, verbose=0)[1]]
    before = keras_bn.diagnose(model, (x, y)).record.layers
    keras_bn.recalibrate(model, x, verbose=0)
    accuracies.append(model.evaluate(*test, verbose=0)[1])
    after = keras_bn.diagnose(model, (x, y)).record.layers
    figure = draw(accuracies, before, after)
    figure.savefig(Path(__file__).with_name("recalibrated.png"), dpi=130)


if __name__ == "__main__":
    main()
