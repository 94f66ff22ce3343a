"""The picture of the README: one model before and after `keras_bn.recalibrate`.

    python docs/pictures/recalibrated.py

The model and its data are those of docs/tutorial.md.
"""

from pathlib import Path

import keras
import numpy as np
from keras import layers
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import keras_bn
from keras_bn.diagnosis.findings import WORST_MEAN_DRIFT

BEFORE, AFTER, QUIET, INK = "#d0393f", "#2f8a3f", "#7f8a94", "#74808b"


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
    axis.barh(range(3), accuracies, color=[QUIET, BEFORE, AFTER], height=0.7)
    axis.set_yticks(range(3), ["training", "evaluated before", "evaluated after"])
    for row, share in enumerate(accuracies):
        place = {"va": "center", "ha": "right", "weight": "bold"}
        axis.text(share - 0.02, row, f"{share:.0%}", color="w", **place)
    axis.set_title("Accuracy", loc="left")
    axis.set_ylim(2.5, -0.5)
    axis.set_xlim(0, 1)
    axis.set_xticks([])


def draw_channels(axis, before, after):
    """A dot for each channel, before and after, over the healthy range."""
    limits = -WORST_MEAN_DRIFT, WORST_MEAN_DRIFT
    axis.axvspan(*limits, color=AFTER, alpha=0.15, lw=0)
    for row, (layers_then, color) in enumerate(((before, BEFORE), (after, AFTER))):
        values = np.concatenate([np.ravel(layer.mean_drift) for layer in layers_then])
        scatter = np.random.default_rng(row).uniform(-0.25, 0.25, values.size)
        axis.scatter(values, row + scatter, color=color, s=40, alpha=0.7, lw=0)
    axis.set_title("Moving means, off the data's", loc="left")
    axis.set_xlabel("standard deviations; a dot is a channel")
    axis.set_yticks(range(2), ["before", "after"])
    axis.set_ylim(1.5, -0.5)


def draw(accuracies, before, after):
    """The figure, of three accuracies and two lists of `LayerRecord`.

    It is as wide as a phone shows at the size of text, and without a background: its
    gray can be read on white and on black.
    """
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08)
    bars, mean = figure.subplots(2, 1, height_ratios=(1.2, 1))
    draw_accuracies(bars, accuracies)
    draw_channels(mean, before, after)
    figure.supxlabel(
        "One channel outside the green is enough to spoil the accuracy.",
        color=INK,
        fontsize=13,
    )
    for axis in (bars, mean):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(INK)
        axis.tick_params(axis="both", colors=INK, length=0)
        axis.set_title(axis.get_title(loc="left"), loc="left", color=INK)
        axis.xaxis.label.set_color(INK)
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
    with rc_context({"font.size": 14, "axes.titlesize": 15}):
        figure = draw(accuracies, before, after)
        path = Path(__file__).with_name("recalibrated.png")
        figure.savefig(path, dpi=110, transparent=True)


if __name__ == "__main__":
    main()
