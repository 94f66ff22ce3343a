"""The fewer images a batch has, the worse batch normalization does; what does better.

A small convolutional network is trained on 500 digits with batches of 2 to 64, all for
as many epochs, with a learning rate in proportion to the batch and moving averages of
as many images. Statistics come from the batch (plain), from ghost batches of that size
inside batches of 64, from the batch but corrected toward the moving statistics (batch
renormalization, with its ramp), from two replicas with such a batch each
(synchronized); or from each image alone: layer, group and instance normalization.

Source: Wu and He, "Group Normalization", 2018, figure 1: batch normalization's error
rises as batches shrink, group normalization's does not; Ioffe, "Batch Renormalization",
2017: renormalization keeps small batches good; Hoffer, Hubara and Soudry, "Train
longer, generalize better", 2017, for ghost batches; Goyal et al., "Accurate, Large
Minibatch SGD", 2017, for the learning rate.
"""

from common import claims, data, drawing, gallery  # isort: skip
from common.convnet import accuracy, convnet, prepare  # isort: skip
from common.restart import Restart  # isort: skip

import contextlib
import itertools
import sys
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_bn

CLAIM = (
    "Batch normalization's error rises as batches shrink to 2, and its lead over group "
    "normalization goes; that is due to the statistics, as ghost batches show; and "
    "renormalization, or statistics shared by two replicas, hold it down."
)
IMAGES, LARGE = 500, 64
SIZES = (2, 4, 16, LARGE)


def momentum(images):
    """That of a moving average over as many images as 0.9 at 32 of them is over."""
    return 0.9 ** (images / 32)


def plain(size, steps):
    return partial(keras_bn.BatchNormalization, momentum=momentum(size))


def ghost(size, steps):
    return partial(
        keras_bn.BatchNormalization, momentum=momentum(size), virtual_batch_size=size
    )


def renorm(size, steps):
    """With the paper's ramp, in proportion to a training that is much shorter."""
    ramp = keras_bn.renorm_ramp(
        begin=steps // 8, dmax_end=steps // 2, rmax_end=3 * steps // 4
    )
    return partial(
        keras_bn.BatchNormalization,
        momentum=momentum(size),
        renorm=True,
        renorm_clipping=ramp,
        renorm_momentum=momentum(size),
    )


def synchronized(size, steps):
    return partial(
        keras_bn.BatchNormalization, momentum=momentum(2 * size), synchronized=True
    )


def layer(size, steps):
    return partial(layers.LayerNormalization, axis=(1, 2, 3))


def group(size, steps):
    return partial(layers.GroupNormalization, groups=8)


def instance(size, steps):
    return partial(layers.GroupNormalization, groups=-1)


BY_BATCH = (plain, ghost, renorm, synchronized)
BY_IMAGE = (layer, group, instance)
METHODS = (*BY_BATCH, *BY_IMAGE)


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example(
        "small_batches", __doc__, seeds=4, short_seeds=1, argv=argv
    )
    sizes = (SIZES[0], SIZES[-1]) if example.short else SIZES
    replicas = two_replicas()
    digits = data.small_digits(IMAGES)
    names = [each.__name__ for each in METHODS]
    errors = {}
    for name, size in example.each(itertools.product(names, sizes)):
        epochs = 1 if example.short else 6
        errors[name, size] = train(name, size, digits, example.seeds, epochs, replicas)
    figures = [
        {
            "seed": seed,
            **{name: {n: errors[name, n][seed] for n in sizes} for name in names},
        }
        for seed in example.seeds
    ]
    example.table(
        f"Validation error after {IMAGES} images, percent, median",
        ["images", *map(str, sizes)],
        [
            [
                name,
                *(f"{100 * np.median(by(figures, name, size)):.1f}" for size in sizes),
            ]
            for name in names
        ],
    )
    return example.conclude(CLAIM, parts_of(figures), figures, draw(figures, sizes))


def two_replicas():
    """A strategy of two replicas on one CPU."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    if not tf.config.get_logical_device_configuration(cpu):
        one = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [one, one])
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def train(name, size, digits, seeds, epochs, replicas):
    """Train with a normalization, whose statistics are of so many images.

    Returns:
        The validation errors, one per seed.
    """
    apart = name == synchronized.__name__
    batch = {ghost.__name__: LARGE, synchronized.__name__: 2 * size}.get(name, size)
    steps = IMAGES // batch * epochs
    normalization = globals()[name](size, steps)
    with replicas.scope() if apart else contextlib.nullcontext():
        # Keras takes several steps at once on one device only.
        model = prepare(
            convnet(normalization, filters=(16, 32), strides=(2, 2)),
            keras.optimizers.SGD(0.2 * batch / 32, momentum=0.9),
            1 if apart else steps,
        )
        restart = Restart(model)
    errors = []
    for seed in seeds:
        restart(seed)
        images = (
            tf.data.Dataset.from_tensor_slices((digits.x_train, digits.y_train))
            .shuffle(IMAGES, seed=seed)
            .batch(batch, drop_remainder=True)
            .repeat(epochs)
        )
        model.fit(images, shuffle=False, verbose=0)
        errors.append(1 - accuracy(model, digits.x_val, digits.y_val))
    return errors


def by(figures, name, size):
    """The error with statistics of so many images, one per seed."""
    return np.array([one[name][size] for one in figures])


def parts_of(figures):
    small, large = SIZES[0], SIZES[-1]

    def lead(size):
        return by(figures, "group", size) - by(figures, "plain", size)

    def part(says, values):
        return claims.Part(says, values, above=0, form="{:+.3f}")

    plain_small = by(figures, "plain", small)
    return [
        part(
            f"error, plain at {small} less at {large}",
            plain_small - by(figures, "plain", large),
        ),
        part(
            f"lead over group normalization, at {large} less at {small}",
            lead(large) - lead(small),
        ),
        part(
            f"error, ghost batches of {small} less of {large}",
            by(figures, "ghost", small) - by(figures, "ghost", large),
        ),
        part(
            f"error at {small}, plain less renorm",
            plain_small - by(figures, "renorm", small),
        ),
        part(
            f"error at {small}, plain less synchronized",
            plain_small - by(figures, "synchronized", small),
        ),
    ]


def draw(figures, sizes):
    """Error against the number of images behind a statistic."""
    figure, axes = drawing.new_figure(
        f"Digits learned from {IMAGES} images, in batches of 2 to 64: validation error",
        [["batch", "image"]],
        size=(12, 5),
    )
    labels = {
        "plain": "batch normalization",
        "ghost": "ghost batches, in batches of 64",
        "renorm": "batch renormalization",
        "synchronized": "two replicas, synchronized",
        "layer": "layer normalization",
        "group": "group normalization, 8 groups",
        "instance": "instance normalization",
    }
    colors = {
        "plain": drawing.COLORS[5],
        "ghost": "#f2b134",
        "renorm": drawing.WITH,
        "synchronized": "#3a7d44",
        "layer": "#7b5ea7",
        "group": drawing.WITHOUT,
        "instance": drawing.COLORS[3],
    }
    for axis, methods in (("batch", BY_BATCH), ("image", (plain, *BY_IMAGE))):
        for name in (each.__name__ for each in methods):
            errors = np.array([[one[name][size] for size in sizes] for one in figures])
            drawing.band(axes[axis], sizes, errors, colors[name], labels[name])
        axes[axis].set_xscale("log", base=2)
        axes[axis].set_xticks(sizes, sizes)
        axes[axis].legend(frameon=False)
    drawing.tidy(
        axes["batch"],
        "Statistics over images",
        "images in a batch, a ghost batch, or the batch of a replica",
        "validation error",
    )
    drawing.tidy(axes["image"], "Statistics of each image alone", "images in a batch")
    for axis in axes.values():
        axis.set_yscale("log")
        axis.set_ylim(0.02, 1)
        drawing.percent(axis, ticks=(0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1))
    return figure


if __name__ == "__main__":
    sys.exit(main())
