"""Fine-tuning on a few images goes better when the moving statistics hold still.

A small convolutional network learns the digits 0 to 4, and is then fine-tuned on 40
images of the digits 5 to 9, in batches of 2: from scratch, as it is (the statistics
follow the small batches), with the base frozen whole, with its statistics frozen by
`keras_bn.freeze(model, fuse=True)`, and with its statistics recalibrated on the 40
images and then frozen. All of this for the new digits as they are, and for a paler
negative of them, where the statistics of the base are not those of the new images.

Fused, a normalization is computed as one with the convolution before it, which saves
time in large networks. The study reports how long a step of this one takes.

Source: the advice of Keras's guide "Transfer learning & fine-tuning" to keep batch
normalization in inference mode; Li et al., "Revisiting Batch Normalization For
Practical Domain Adaptation", 2016, for new statistics in a new domain.
"""

from common import claims, data, drawing, gallery  # isort: skip
from common.convnet import accuracy, convnet, prepare  # isort: skip
from common.restart import Restart  # isort: skip

import itertools
import sys
import time
from functools import partial

import keras
import numpy as np

import keras_bn

CLAIM = (
    "Fine-tuned on 40 images in batches of 2, a base whose moving statistics are "
    "frozen classifies better than one whose statistics follow the batches; where the "
    "new images look different, recalibrating the statistics first is better still."
)
DOMAINS = {
    "as they are": lambda x: x,
    "in negative": lambda x: 0.3 + 0.5 * (1 - x),
}
WAYS = (
    "from scratch",
    "trainable",
    "base frozen",
    "statistics frozen",
    "recalibrated",
)
# Models whose steps are timed, and how their statistics are frozen.
TIMED = {
    "statistics follow": None,
    "frozen": {"fuse": False},
    "frozen and fused": {"fuse": True},
}
LABELLED, BATCH = 40, 2
STEPS = LABELLED // BATCH


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("transfer", __doc__, seeds=5, short_seeds=1, argv=argv)
    digits = data.small_digits()
    epochs = 2 if example.short else 20
    models = {way: start(way) for way in WAYS}
    restarts = {way: Restart(model) for way, model in models.items()}
    pretrained, found = {}, {}
    for seed, domain in example.each(itertools.product(example.seeds, DOMAINS)):
        if seed not in pretrained:
            pretrained[seed] = pretrain(digits, seed, 2 if example.short else 12)
        images = new_digits(digits, seed, DOMAINS[domain])
        found[seed, domain] = {}
        for way in WAYS:
            restarts[way](seed)
            found[seed, domain][way] = fine_tune(
                models[way], way, pretrained[seed], images, epochs
            )
    figures = [
        {"seed": seed, **{domain: found[seed, domain] for domain in DOMAINS}}
        for seed in example.seeds
    ]
    example.table(
        f"Accuracy on the digits 5 to 9 after {LABELLED} images, median",
        ["", *DOMAINS, "statistics moved"],
        [
            [
                way,
                *(f"{np.median(accuracies(figures, d, way)):.1%}" for d in DOMAINS),
                "yes" if any(moved(figures, way)) else "not by a bit",
            ]
            for way in WAYS
        ],
    )
    rounds = 1 if example.short else 9
    example.table(
        "Milliseconds of a training step, median",
        ["images in a batch", *TIMED],
        [
            [batch, *(f"{ms:.2f}" for ms in step_times(digits, batch, rounds))]
            for batch in (BATCH, 32, 256)
        ],
    )
    return example.conclude(CLAIM, parts_of(figures), figures, draw(figures))


def make():
    return convnet(partial(keras_bn.BatchNormalization, momentum=0.9), classes=5)


def start(way):
    """A model, compiled, to be fine-tuned in this way."""
    model = make()
    if way in ("statistics frozen", "recalibrated"):
        keras_bn.freeze(model, fuse=True)
    if way == "base frozen":
        model.get_layer("base").trainable = False
    # A head alone has little to learn, and can do it fast.
    rate = 3e-2 if way == "base frozen" else 3e-3
    return prepare(model, keras.optimizers.Adam(rate), STEPS)


def step_times(digits, batch, rounds):
    """Milliseconds of a step of each model in `TIMED`, with all of it trainable.

    The models take turns, and the first round, which traces them, isn't counted.
    """
    steps = 20
    chosen = np.arange(steps * batch) % len(digits.x_train)
    x, y = digits.x_train[chosen], digits.y_train[chosen]
    models = []
    for how in TIMED.values():
        model = convnet(keras_bn.BatchNormalization)  # of ten classes
        if how is not None:
            keras_bn.freeze(model, **how)
        models.append(prepare(model, keras.optimizers.Adam(3e-3), 4))
    times = [[] for _ in models]
    for _ in range(rounds + 1):
        for taken, model in zip(times, models, strict=True):
            start = time.perf_counter()
            model.fit(x, y, batch, verbose=0)
            taken.append(1e3 * (time.perf_counter() - start) / steps)
    return [np.median(taken[1:]) for taken in times]


def pretrain(digits, seed, epochs):
    """The weights of a base that has learned the digits 0 to 4."""
    keras.utils.set_random_seed(seed)
    model = prepare(make(), keras.optimizers.Adam(3e-3), 20)
    known = digits.y_train < 5
    model.fit(digits.x_train[known], digits.y_train[known], epochs=epochs, verbose=0)
    return model.get_layer("base").get_weights()


def new_digits(digits, seed, look):
    """The digits 5 to 9, as classes 0 to 4, in an order of this seed."""
    x = np.concatenate([digits.x_train, digits.x_val])
    y = np.concatenate([digits.y_train, digits.y_val])
    order = np.random.default_rng(seed).permutation(np.flatnonzero(y >= 5))
    return look(x[order]), y[order] - 5


def fine_tune(model, way, pretrained, images, epochs):
    """Fine-tune on the first images.

    Returns:
        A dict: `accuracy` on all other images, and how many moving statistics of the
        base were `moved` by training.
    """
    base = model.get_layer("base")
    (x, x_val), (y, y_val) = (np.split(array, [LABELLED]) for array in images)
    if way != "from scratch":
        base.set_weights(pretrained)
    if way == "recalibrated":
        keras_bn.recalibrate(
            base, x, batch_size=LABELLED, include_frozen=True, verbose=0
        )
    before = statistics(base)
    model.fit(x, y, BATCH, epochs, verbose=0)
    return {
        "accuracy": accuracy(model, x_val, y_val),
        "moved": int((statistics(base) != before).sum()),
    }


def statistics(base):
    """All moving statistics, as one array."""
    return np.concatenate(
        [
            value.numpy()
            for layer in base.layers
            if isinstance(layer, keras_bn.BatchNormalization)
            for value in (layer.moving_mean, layer.moving_variance)
        ]
    )


def accuracies(figures, domain, way):
    return np.array([one[domain][way]["accuracy"] for one in figures])


def moved(figures, way):
    return [sum(one[domain][way]["moved"] for domain in DOMAINS) for one in figures]


def parts_of(figures):
    same, other = DOMAINS

    def gain(says, domain, way, over):
        values = accuracies(figures, domain, way) - accuracies(figures, domain, over)
        return claims.Part(says, values, above=0, form="{:+.3f}")

    return [
        gain(
            "accuracy with statistics frozen, less that with all trainable",
            same,
            "statistics frozen",
            "trainable",
        ),
        gain(
            f"{other}: accuracy with statistics recalibrated, less that with them as "
            "they were",
            other,
            "recalibrated",
            "statistics frozen",
        ),
        gain(
            f"{other}: accuracy with statistics recalibrated, less that with all "
            "trainable",
            other,
            "recalibrated",
            "trainable",
        ),
        claims.Part(
            "frozen statistics that training moved",
            moved(figures, "statistics frozen"),
            below=1,
            form="{:.0f}",
        ),
    ]


def draw(figures):
    """Accuracy by way of fine-tuning, for the digits as they are and in negative."""
    names = list(DOMAINS)
    figure, axes = drawing.new_figure(
        f"From the digits 0-4 to 5-9 with {LABELLED} images in batches of {BATCH}:\n"
        "what to do with the moving statistics?  One dot per seed, bars at medians",
        [[f"{name} images" for name in names], names],
        size=(12, 6),
        height_ratios=(1, 4),
    )
    samples = data.small_digits()
    shown = [
        samples.x_val[np.flatnonzero(samples.y_val == digit)[0], ..., 0]
        for digit in range(5, 10)
    ]
    colors = ("#8d99ae", drawing.WITHOUT, "#f2b134", drawing.WITH, "#3a7d44")
    labels = (
        "from\nscratch",
        "all trained,\nstatistics\nfollow",
        "base frozen,\nhead trained",
        "all trained,\nstatistics\nfrozen",
        "the same,\nrecalibrated\nbefore",
    )
    every = [accuracies(figures, name, way) for name in names for way in WAYS]
    for name, look in DOMAINS.items():
        drawing.images(axes[f"{name} images"], [look(x) for x in shown])
        axis = axes[name]
        for at, (way, color) in enumerate(zip(WAYS, colors, strict=True)):
            values = accuracies(figures, name, way)
            drawing.dots(axis, at, values, color)
            median = np.median(values)
            axis.text(at + 0.28, median, f"{median:.1%}", va="center", color=color)
        axis.set_xticks(range(len(WAYS)), labels)
        axis.set_xlim(-0.4, len(WAYS) - 0.1)
        axis.set_ylim(np.min(every) - 0.01, np.max(every) + 0.01)
        drawing.tidy(axis, f"The new digits {name}", ylabel="accuracy on 5 to 9")
        drawing.percent(axis)
    return figure


if __name__ == "__main__":
    sys.exit(main())
