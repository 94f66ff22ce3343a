"""New images look different: their own statistics repair what that breaks.

A small convolutional network learns the digits as they are, and then meets them paler,
brighter or noisy. `keras_bn.recalibrate` puts in statistics of unlabelled new images:
of all there are, and of few of them, blended with those of training, which count as
`prior` images. `keras_bn.adapt` blends them with those of each batch that comes. The
prior for a seed is the best one in the other seeds. TENT normalizes by the batch, and
after each one trains gamma and beta, and nothing else, to make predictions more
certain. And, to see it go wrong, a stream of images that are all of one class.

Sources: Schneider et al., "Improving robustness against common corruptions by covariate
shift adaptation", 2020: new statistics repair much of it; with few images, a prior is
needed. Wang et al., "Tent: Fully test-time adaptation by entropy minimization", 2021:
it repairs more than new statistics alone.
"""

from common import claims, data, drawing, gallery  # isort: skip
from common.convnet import accuracy, convnet, prepare  # isort: skip

import sys
import warnings
from functools import partial

import keras
import numpy as np
import tensorflow as tf

import keras_bn

CLAIM = (
    "The statistics of the new images repair much of what their different look breaks, "
    "those of each batch too; of few images, better blended with a prior; entropy "
    "minimization repairs more; and a stream of one class does harm, with a warning."
)
SHIFTS = {
    "contrast": lambda x, rng: 0.5 + 0.6 * (x - 0.5),
    "brightness": lambda x, rng: x + 0.5,
    "noise": lambda x, rng: x + rng.normal(0.0, 0.3, x.shape).astype("float32"),
}
FEW = (2, 8)
COUNTS = (*FEW, 300)
PRIORS = (0, 1, 4, 16, 64, 256)
BATCHES = (8, 32)
RATE = 1e-3  # of Adam, as TENT has it for images of 32 by 32
STREAM, STREAM_PRIORS = 40, (0, 10, 40, 160, 640)


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("shifted_domain", __doc__, 5, short_seeds=1, argv=argv)
    digits = data.small_digits(1000)
    epochs = 5 if example.short else 15
    figures = [
        {"seed": seed, **measure(train(digits, seed, epochs), digits, seed)}
        for seed in example.each(example.seeds)
    ]
    example.table(
        "Accuracy, median",
        [
            "",
            "before",
            f"{COUNTS[-1]} images",
            *(header for few in FEW for header in (f"{few} images", "& prior")),
        ],
        [
            [shift, *(f"{np.median(values):.1%}" for values in row(figures, shift))]
            for shift in SHIFTS
        ],
    )
    example.table(
        "Accuracy while following the batches, median",
        [
            "",
            *(h for size in BATCHES for h in (f"batches of {size}", "& prior")),
            f"TENT, batches of {BATCHES[-1]}",
        ],
        [
            [
                shift,
                *(f"{np.median(values):.1%}" for values in following(figures, shift)),
            ]
            for shift in SHIFTS
        ],
    )
    example.say("", f"The warning of the stream: {figures[0]['stream']['warning']}")
    return example.conclude(CLAIM, parts_of(figures), figures, draw(figures, digits))


def train(digits, seed, epochs):
    """A model that has learned the digits as they are."""
    keras.utils.set_random_seed(seed)
    model = convnet(partial(keras_bn.BatchNormalization, momentum=0.9))
    prepare(model, keras.optimizers.Adam(3e-3), 20)
    model.fit(digits.x_train, digits.y_train, 32, epochs, verbose=0)
    return model


def measure(model, digits, seed):
    """Accuracy under each shift and on the stream, before and after each remedy."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.x_val))
    x, y = digits.x_val[order], digits.y_val[order]
    measured = {
        shift: adapt(model, change(x, rng), y) for shift, change in SHIFTS.items()
    }
    return {**measured, "stream": follow_stream(model, x, y)}


def adapt(model, x, y):
    """Recalibrate on the first images, or follow the others; evaluate on these.

    Returns:
        A dict: accuracy `before`; `after` recalibration, one row per count of images,
        one column per prior; `followed`, one row per size of batch, one column per
        prior; and with `tent`.
    """
    x_val, y_val = x[COUNTS[-1] :], y[COUNTS[-1] :]

    def found(count):
        images = tf.data.Dataset.from_tensors(x[:count])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few images are the subject
            return keras_bn.statistics(model, images, verbose=0)

    return {
        "before": accuracy(model, x_val, y_val),
        "after": [
            [blended(model, new, prior, x_val, y_val) for prior in PRIORS]
            for new in map(found, COUNTS)
        ],
        "followed": [
            [followed(model, x_val, y_val, size, prior) for prior in PRIORS]
            for size in BATCHES
        ],
        "tent": tent(model, x_val, y_val, BATCHES[-1]),
    }


def blended(model, new, prior, x, y):
    """Accuracy with new statistics, and the old ones counted as so many images.

    What `keras_bn.recalibrate(model, images, prior=prior)` would give.
    """
    old = keras_bn.statistics(model).counted(prior)
    with keras_bn.using(model, keras_bn.pooled([old, new])):
        return accuracy(model, x, y)


def followed(model, x, y, size, prior):
    """Accuracy of inference that pools its statistics with those of each batch."""
    keras_bn.adapt(model, prior=prior)
    right = [accuracy(model, *batch) * len(batch[0]) for batch in batches(x, y, size)]
    keras_bn.unadapt(model)
    return sum(right) / len(x)


def tent(model, x, y, size):
    """Accuracy under entropy minimization: each batch is predicted, then learned from.

    The statistics are those of the batch, in both. As the paper has it, online: one
    step of Adam a batch. Its streams are longer, 50 steps in batches of 200 images.
    """
    learner = keras.models.clone_model(model)
    learner.set_weights(model.get_weights())
    base, head = learner.layers
    for layer in [*base.layers, head]:
        layer.trainable = isinstance(layer, keras_bn.BatchNormalization)
    learner.compile(keras.optimizers.Adam(RATE), entropy)
    right = 0.0
    for images, classes in batches(x, y, size):
        right += accuracy(learner, images, classes, training=True) * len(images)
        learner.train_on_batch(images, classes)  # the loss does not look at the classes
    return right / len(x)


def entropy(_, logits):
    """The entropy of the predictions, in nats."""
    logs = keras.ops.log_softmax(logits)
    return -keras.ops.sum(keras.ops.exp(logs) * logs, axis=-1)


def batches(x, y, size):
    for start in range(0, len(x), size):
        yield x[start : start + size], y[start : start + size]


def follow_stream(model, x, y):
    """Recalibrate on images of a one, and evaluate on all classes.

    Returns:
        A dict: accuracy `before`, and `after`, one for each prior; the `warning`.
    """
    chosen = np.zeros(len(x), bool)
    chosen[np.flatnonzero(y == 1)[:STREAM]] = True
    stream = tf.data.Dataset.from_tensors((x[chosen], y[chosen]))
    results = [
        recalibrated(model, stream, prior, x[~chosen], y[~chosen])
        for prior in STREAM_PRIORS
    ]
    return {
        "before": accuracy(model, x[~chosen], y[~chosen]),
        "after": [after for after, _ in results],
        "warned": all("classes in effect" in warning for _, warning in results),
        "warning": results[0][1],
    }


def recalibrated(model, images, prior, x, y):
    """Recalibrate, evaluate, and put the model back as it was.

    Returns:
        The accuracy, and what `recalibrate` warned of, if anything.
    """
    before = model.get_weights()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        keras_bn.recalibrate(model, images, prior=prior, verbose=0)
    after = accuracy(model, x, y)
    model.set_weights(before)
    return after, " ".join(
        str(each.message) for each in warned if each.category is UserWarning
    )


def by(figures, shift, count, prior):
    """Accuracy after so many images with this prior, one per seed."""
    row, column = COUNTS.index(count), PRIORS.index(prior)
    return np.array([one[shift]["after"][row][column] for one in figures])


def with_good_prior(figures, shift, how, row):
    """Accuracy with the prior that is best in the other seeds, one per seed."""
    after = np.array([one[shift][how][row] for one in figures])
    others = after.sum(0) - after if len(after) > 1 else after
    return after[range(len(after)), others.argmax(1)]


def row(figures, shift):
    """What the table shows of a shift: lists of one accuracy per seed."""
    yield [one[shift]["before"] for one in figures]
    yield by(figures, shift, COUNTS[-1], 0)
    for few in FEW:
        yield by(figures, shift, few, 0)
        yield with_good_prior(figures, shift, "after", COUNTS.index(few))


def following(figures, shift):
    """What the table of batches shows of a shift: lists of one accuracy per seed."""
    for i in range(len(BATCHES)):
        yield each_batch(figures, shift, i)
        yield with_good_prior(figures, shift, "followed", i)
    yield [one[shift]["tent"] for one in figures]


def each_batch(figures, shift, i):
    """Accuracy with the statistics of each batch alone, one per seed."""
    column = PRIORS.index(0)
    return np.array([one[shift]["followed"][i][column] for one in figures])


def parts_of(figures):
    parts = []
    for shift in SHIFTS:
        before = np.array([one[shift]["before"] for one in figures])
        parts.append(
            claims.Part(
                f"{shift}: accuracy after {COUNTS[-1]} new images, less before",
                by(figures, shift, COUNTS[-1], 0) - before,
                above=0,
                form="{:+.3f}",
            )
        )
        parts += [
            claims.Part(
                f"{shift}: accuracy from {few} images with a good prior, less without",
                with_good_prior(figures, shift, "after", COUNTS.index(few))
                - by(figures, shift, few, 0),
                above=0,
                form="{:+.3f}",
            )
            for few in FEW
        ]
        parts += following_parts(figures, shift, before)
    stream = [one["stream"] for one in figures]
    return [
        *parts,
        claims.Part(
            "one class: accuracy with its statistics, less before",
            [one["after"][0] - one["before"] for one in stream],
            below=0,
            form="{:+.3f}",
        ),
        claims.Part(
            "one class: warned of, 1 for yes",
            [one["warned"] for one in stream],
            above=0,
            form="{:.0f}",
        ),
    ]


def following_parts(figures, shift, before):
    small, large = BATCHES
    tent = [one[shift]["tent"] for one in figures]
    differences = {
        f"accuracy in batches of {large} with a good prior, less before": (
            with_good_prior(figures, shift, "followed", 1) - before
        ),
        f"accuracy in batches of {small} with a good prior, less without": (
            with_good_prior(figures, shift, "followed", 0)
            - each_batch(figures, shift, 0)
        ),
        f"accuracy with TENT, less with statistics of batches of {large} alone": (
            tent - each_batch(figures, shift, 1)
        ),
    }
    return [
        claims.Part(f"{shift}: {says}", values, above=0, form="{:+.3f}")
        for says, values in differences.items()
    ]


def draw(figures, digits):
    """Accuracy against the prior, for each shift and for the stream of one class."""
    titles = {
        "contrast": "Paler",
        "brightness": "Brighter",
        "noise": "Noisy",
        "stream": f"As they are, but {STREAM} images of a 1",
    }
    figure, axes = drawing.new_figure(
        "A model trained on the digits as they are meets others, and gets their "
        "statistics.\nAccuracy by how many images the old statistics count for "
        "(the prior); median and range over seeds",
        [[f"{name} images" for name in titles], list(titles)],
        size=(14, 6),
        height_ratios=(1, 4),
    )
    rng = np.random.default_rng(0)
    ones = digits.x_val[digits.y_val == 1]
    colors = ("#f2b134", "#3a7d44", drawing.WITH)
    for name, title in titles.items():
        change = SHIFTS.get(name, lambda x, rng: x)
        shown = ones[:4] if name == "stream" else digits.x_val[:4]
        drawing.images(axes[f"{name} images"], change(shown, rng)[..., 0])
        axis = axes[name]
        before = np.median([one[name]["before"] for one in figures])
        axis.axhline(before, color=drawing.WITHOUT, ls="--")
        axis.annotate(
            "before",
            (1, before),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=drawing.WITHOUT,
        )
        after = np.array([one[name]["after"] for one in figures])
        if name == "stream":
            drawing.band(axis, range(len(STREAM_PRIORS)), after, drawing.COLORS[4])
            axis.set_xticks(range(len(STREAM_PRIORS)), STREAM_PRIORS)
        else:
            for row, (count, color) in enumerate(zip(COUNTS, colors, strict=True)):
                label = f"statistics of {count} images"
                drawing.band(axis, range(len(PRIORS)), after[:, row], color, label)
            axis.set_xticks(range(len(PRIORS)), PRIORS)
        drawing.tidy(axis, title, "prior")
        drawing.percent(axis)
    axes["contrast"].set_ylabel("accuracy on other images")
    axes["contrast"].legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
