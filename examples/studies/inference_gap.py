"""What trains well evaluates badly while the moving statistics lag, and what fixes it.

A small convolutional network is trained on the digits with several rules for its
moving statistics. The rule has no part in training, so the weights are the same: what
differs is what inference makes of them. After t steps at momentum m, a share of m^t of
the moving statistics is still their initial values; `debias=True` takes that out, a
lower momentum forgets it sooner, and `keras_bn.recalibrate` computes them again. And
`keras_bn.diagnose` says that, and where, they are wrong.

Source: Ioffe and Szegedy, "Batch Normalization", 2015, section 3.1, for moving
averages; Kingma and Ba, "Adam", 2015, section 3, for the bias of a moving average;
Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3, for its lag.
"""

from common import claims, data, drawing, gallery  # isort: skip
from common.convnet import accuracy, convnet, prepare  # isort: skip
from common.restart import Restart  # isort: skip

import itertools
import sys
from functools import partial

import keras
import numpy as np

import keras_bn

CLAIM = (
    "After one epoch, a model with Keras's default momentum evaluates far worse than "
    "with the statistics of its batches; `diagnose` finds it, and `debias`, a lower "
    "momentum, or `recalibrate` fixes it. What lag is left grows with the momentum."
)
DEFAULT, DEBIASED, LOW = "momentum 0.99", "0.99, debias", "momentum 0.9"
RULES = {
    DEFAULT: {"momentum": 0.99},
    DEBIASED: {"momentum": 0.99, "debias": True},
    LOW: {"momentum": 0.9},
}
BATCH, PER_EPOCH = 32, 45
BATCHES = "by batch statistics"


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("inference_gap", __doc__, 5, short_seeds=1, argv=argv)
    digits = data.small_digits()
    epochs = 1 if example.short else 4
    adam = keras.optimizers.Adam
    models = {rule: prepare(make(rule), adam(3e-3)) for rule in RULES}
    restarts = {rule: Restart(model) for rule, model in models.items()}
    found = {
        (seed, rule): measure(models[rule], restarts[rule], digits, seed, epochs)
        for seed, rule in example.each(itertools.product(example.seeds, RULES))
    }
    figures = [
        {"seed": seed, **{rule: found[seed, rule] for rule in RULES}}
        for seed in example.seeds
    ]
    example.table(
        "Validation accuracy after one epoch, median",
        ["", "as it is", BATCHES, "recalibrated", "gap diagnosed", "then"],
        [
            [
                rule,
                *(
                    f"{np.median(first(figures, rule, name)):.1%}"
                    for name in ("inference", "batches", "recalibrated")
                ),
                *(
                    f"{int(sum(first(figures, rule, name)))} of {len(figures)}"
                    for name in ("diagnosed", "diagnosed_again")
                ),
            ]
            for rule in RULES
        ],
    )
    example.say("", f"keras_bn.diagnose on {DEFAULT} after one epoch:", "")
    example.say(figures[0][DEFAULT]["report"])
    return example.conclude(CLAIM, parts_of(figures), figures, draw(figures))


def make(rule):
    return convnet(partial(keras_bn.BatchNormalization, **RULES[rule]))


class Watch(keras.callbacks.Callback):
    """Notes the validation accuracy in inference and by batch statistics."""

    def __init__(self, digits, every):
        super().__init__()
        self.digits, self.every = digits, every
        self.steps, self.inference, self.batches = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if step % self.every:
            return
        x, y = self.digits.x_val, self.digits.y_val
        self.steps.append(step)
        self.inference.append(accuracy(self.model, x, y))
        before = self.model.get_weights()
        self.batches.append(accuracy(self.model, x, y, training=True))
        self.model.set_weights(before)


def measure(model, restart, digits, seed, epochs):
    """Train, watching; diagnose after each epoch, and recalibrate after the first.

    Returns:
        A dict: by step, accuracy in `inference` and by the statistics of `batches`;
        by epoch, the `drift` of the moving means from those of the data, in standard
        deviations; and after the first epoch the `report`, whether the gap was
        `diagnosed`, and, once recalibrated, `diagnosed_again`, and the accuracy.
    """
    restart(seed)
    watch, found = Watch(digits, 5), {"drift": []}
    for epoch in range(epochs):
        model.fit(digits.x_train, digits.y_train, BATCH, verbose=0, callbacks=[watch])
        report = diagnose(model, digits)
        drift = [np.abs(layer.mean_drift) for layer in report.record.layers]
        found["drift"].append(float(np.median(np.concatenate(drift))))
        if not epoch:
            found.update(
                report=str(report), **after_recalibration(model, digits, report)
            )
    return {
        "steps": watch.steps,
        "inference": watch.inference,
        "batches": watch.batches,
        **found,
    }


def diagnose(model, digits, batches=10):
    """The diagnosis of a model, from a part of the training images."""
    part = slice(batches * BATCH)
    images = digits.x_train[part], digits.y_train[part]
    return keras_bn.diagnose(model, images, batch_size=BATCH)


def after_recalibration(model, digits, report):
    """Recalibrate, evaluate, diagnose again, and put the model back as it was."""
    before = model.get_weights()
    keras_bn.recalibrate(model, digits.x_train, batch_size=BATCH, verbose=0)
    recalibrated = accuracy(model, digits.x_val, digits.y_val)
    again = diagnose(model, digits)
    model.set_weights(before)
    return {
        "recalibrated": recalibrated,
        "diagnosed": has_gap(report),
        "diagnosed_again": has_gap(again),
    }


def has_gap(report):
    """Whether the report says that inference is not what training was."""
    return any(each.kind == "train-inference-gap" for each in report.findings)


def first(figures, rule, name):
    """A value of the end of the first epoch, one per seed."""
    values = [one[rule][name] for one in figures]
    if name in ("inference", "batches"):
        values = [value[PER_EPOCH // 5 - 1] for value in values]
    return np.array(values, float)


def parts_of(figures):
    def gap(rule, name="inference"):
        return first(figures, rule, "batches") - first(figures, rule, name)

    def last_drift(rule):
        return np.array([one[rule]["drift"][-1] for one in figures])

    says = "accuracy by batch statistics, less that in inference: "
    return [
        claims.Part(says + DEFAULT, gap(DEFAULT), above=0.2),
        claims.Part(says + DEBIASED, gap(DEBIASED), below=0.05),
        claims.Part(says + LOW, gap(LOW), below=0.05),
        claims.Part(
            says + f"{DEFAULT}, recalibrated",
            gap(DEFAULT, "recalibrated"),
            below=0.05,
        ),
        claims.Part(
            f"{DEFAULT}: diagnosed, 1 for yes",
            first(figures, DEFAULT, "diagnosed"),
            above=0,
            form="{:.0f}",
        ),
        claims.Part(
            f"{DEFAULT}, recalibrated: diagnosed, 1 for yes",
            first(figures, DEFAULT, "diagnosed_again"),
            below=1,
            form="{:.0f}",
        ),
        claims.Part(
            f"drift at the end, {DEBIASED} over {LOW}",
            last_drift(DEBIASED) / last_drift(LOW),
            above=1,
        ),
    ]


def draw(figures):
    """Accuracy by step and after recalibrating, and how far off the statistics are."""
    figure, axes = drawing.new_figure(
        "One training, three rules for the moving statistics "
        "(median and range over seeds)",
        [["steps", "steps", "first epoch", "drift"]],
        size=(14, 5),
    )
    colors = dict(zip(RULES, (drawing.WITHOUT, "#f2b134", drawing.WITH), strict=True))
    steps = figures[0][DEFAULT]["steps"]
    grey = drawing.COLORS[5]
    for rule, color in colors.items():
        inference = [one[rule]["inference"] for one in figures]
        drawing.band(axes["steps"], steps, inference, color, rule, ms=3)
        drift = np.array([one[rule]["drift"] for one in figures])
        drawing.band(axes["drift"], np.arange(drift.shape[1]) + 1, drift, color, rule)
    batches = [one[DEFAULT]["batches"] for one in figures]
    drawing.band(axes["steps"], steps, batches, grey, BATCHES, ms=3)
    axes["steps"].axvline(PER_EPOCH, color=grey, lw=0.8, ls=":")
    axes["steps"].text(PER_EPOCH, 0.02, " first epoch ends")
    ways = {
        "inference": ("as it is", drawing.WITHOUT),
        "recalibrated": ("recalibrated", drawing.COLORS[3]),
        "batches": ("by batch\nstatistics", grey),
    }
    for at, (name, (_, color)) in enumerate(ways.items()):
        values = first(figures, DEFAULT, name)
        median = np.median(values)
        drawing.dots(axes["first epoch"], at, values, color)
        below = {"ha": "center", "va": "top", "color": color}
        axes["first epoch"].text(at, min(values) - 0.03, f"{median:.0%}", **below)
    axes["first epoch"].set_xticks(range(3), [label for label, _ in ways.values()])
    found = int(sum(first(figures, DEFAULT, "diagnosed")))
    drawing.tidy(axes["steps"], "Validation accuracy", "training step")
    drawing.tidy(
        axes["first epoch"],
        f"{DEFAULT} after one epoch:\na gap is diagnosed in {found} of {len(figures)}",
    )
    drawing.tidy(
        axes["drift"],
        "How far the moving means are from\nthose of the data, in standard deviations",
        "epoch",
    )
    for name in ("steps", "first epoch"):
        axes[name].set_ylim(0, 1)
        drawing.percent(axes[name])
    axes["drift"].set_ylim(bottom=0)
    axes["drift"].set_xticks(range(1, 1 + len(figures[0][DEFAULT]["drift"])))
    axes["steps"].legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
