"""Averaged weights evaluate badly until the moving statistics are recalibrated.

A small convolutional network is trained twice from the same start at a high learning
rate: once under Keras's `SwapEMAWeights`, which puts the exponential average of the
weights in for validation, and once more with `keras_bn.Recalibrate` after it in the
list of callbacks. Nothing in training has ever seen the averaged weights, so that the
moving statistics are not theirs. The same for the plain average of the weights after
each epoch (stochastic weight averaging), done by hand.

Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
Generalization", 2018, section 3.2: after averaging, one more pass over the data is
needed for batch normalization, and the average then beats the weights it is made of.
"""

from common import claims, data, drawing, gallery  # isort: skip
from common.convnet import accuracy, convnet, prepare  # isort: skip

import itertools
import sys
from functools import partial

import keras
import numpy as np

import keras_bn

CLAIM = (
    "With the moving statistics that training leaves, averaged weights evaluate worse "
    "than the weights they are an average of; recalibrated, they evaluate better."
)
EMA, SWA = "SwapEMAWeights", "plain average"
ROWS = ("not averaged", "averaged", "recalibrated")
RATE, EMA_MOMENTUM, BATCH = 0.3, 0.98, 32


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example(
        "weight_averaging", __doc__, seeds=5, short_seeds=1, argv=argv
    )
    digits = data.small_digits(500)
    epochs = 3 if example.short else 10
    found = {}
    for seed, kind in example.each(itertools.product(example.seeds, (EMA, SWA))):
        train = {EMA: moving_average, SWA: plain_average}[kind]
        found[seed, kind] = train(digits, seed, epochs)
    figures = [
        {"seed": seed, **{kind: found[seed, kind] for kind in (EMA, SWA)}}
        for seed in example.seeds
    ]
    for kind in (EMA, SWA):
        example.table(
            f"{kind}: validation accuracy by epoch in percent, median",
            ["", *map(str, range(1, epochs + 1))],
            [
                [
                    row,
                    *(
                        f"{100 * value:.1f}"
                        for value in np.median(curves(figures, kind, row), 0)
                    ),
                ]
                for row in ROWS
            ],
        )
    return example.conclude(CLAIM, parts_of(figures), figures, draw(figures))


def start(seed, **options):
    """A new model, compiled; the same for the same seed."""
    keras.utils.set_random_seed(seed)
    model = convnet(partial(keras_bn.BatchNormalization, momentum=0.9))
    return prepare(model, keras.optimizers.SGD(RATE, momentum=0.9, **options))


class Accuracy(keras.callbacks.Callback):
    """Notes the validation accuracy as the model stands after each epoch."""

    def __init__(self, digits):
        super().__init__()
        self.digits, self.values = digits, []

    def on_epoch_end(self, epoch, logs=None):
        self.values.append(accuracy(self.model, self.digits.x_val, self.digits.y_val))


def moving_average(digits, seed, epochs):
    """Train with and without `Recalibrate` after Keras's `SwapEMAWeights`.

    Returns:
        By row, the validation accuracy after each epoch.
    """
    found = {}
    for row, after in (
        ("averaged", []),
        (
            "recalibrated",
            [keras_bn.Recalibrate(digits.x_train, batch_size=BATCH)],
        ),
    ):
        model = start(seed, use_ema=True, ema_momentum=EMA_MOMENTUM)
        last, averaged = Accuracy(digits), Accuracy(digits)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        model.fit(
            digits.x_train,
            digits.y_train,
            BATCH,
            epochs,
            verbose=0,
            callbacks=[last, swap, *after, averaged],
        )
        found.setdefault("not averaged", last.values)
        found[row] = averaged.values
    return {row: found[row] for row in ROWS}


class PlainAverage(keras.callbacks.Callback):
    """Averages the weights after each epoch, and evaluates the average both ways."""

    def __init__(self, digits):
        super().__init__()
        self.digits, self.values = digits, {row: [] for row in ROWS}

    def on_epoch_end(self, epoch, logs=None):
        model, before = self.model, self.model.get_weights()
        self._note("not averaged")
        now = [value.numpy() for value in model.trainable_variables]
        if not epoch:
            self.average = now
        for i, value in enumerate(now):
            self.average[i] = self.average[i] + (value - self.average[i]) / (epoch + 1)
            model.trainable_variables[i].assign(self.average[i])
        self._note("averaged")
        keras_bn.recalibrate(model, self.digits.x_train, batch_size=BATCH, verbose=0)
        self._note("recalibrated")
        model.set_weights(before)

    def _note(self, row):
        digits = self.digits
        self.values[row].append(accuracy(self.model, digits.x_val, digits.y_val))


def plain_average(digits, seed, epochs):
    """Train, and evaluate the plain average of the weights after each epoch.

    Returns:
        By row, the validation accuracy after each epoch.
    """
    averaged = PlainAverage(digits)
    start(seed).fit(
        digits.x_train,
        digits.y_train,
        BATCH,
        epochs,
        verbose=0,
        callbacks=[averaged],
    )
    return averaged.values


def curves(figures, kind, row):
    """Validation accuracy, of shape (seeds, epochs)."""
    return np.array([one[kind][row] for one in figures])


def parts_of(figures):
    last, averaged, recalibrated = ROWS
    parts = []
    for kind in (EMA, SWA):

        def gain(row, over, kind=kind):
            """Over all epochs but the first, where there is hardly an average yet."""
            difference = curves(figures, kind, row) - curves(figures, kind, over)
            return difference[:, 1:].mean(1)

        says = f"{kind}: accuracy over the epochs, "
        parts += [
            claims.Part(
                says + "averaged less not averaged",
                gain(averaged, last),
                below=0,
                form="{:+.3f}",
            ),
            claims.Part(
                says + "recalibrated less not averaged",
                gain(recalibrated, last),
                above=0,
                form="{:+.3f}",
            ),
        ]
    return parts


def draw(figures):
    """Validation error by epoch, for both kinds of average."""
    figure, axes = drawing.new_figure(
        "What averaged weights are worth with the statistics that training left,\n"
        "and with recalibrated ones (median and range over seeds)",
        [[EMA, SWA]],
    )
    titles = {
        EMA: "Moving average of the weights: keras.callbacks.SwapEMAWeights",
        SWA: "Plain average of the weights after each epoch (SWA)",
    }
    labels = (
        "not averaged",
        "averaged, statistics of training",
        "averaged, then recalibrated",
    )
    colors = (drawing.COLORS[5], drawing.WITHOUT, drawing.WITH)
    for kind, title in titles.items():
        axis = axes[kind]
        for row, label, color in zip(ROWS, labels, colors, strict=True):
            error = 1 - curves(figures, kind, row)
            drawing.band(axis, np.arange(error.shape[1]) + 1, error, color, label)
        drawing.tidy(axis, title, "epoch", "validation error")
        axis.set_yscale("log")
        axis.set_ylim(0.02, 1)
        drawing.percent(axis, ticks=(0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1))
    axes[SWA].legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
