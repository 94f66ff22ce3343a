"""Figure 1 of the paper that introduced batch normalization, measured again.

Networks of 784 inputs, three layers of 100 sigmoid units and 10 classes, with small
Gaussian weights, trained by plain stochastic gradient descent on batches of 60 for
50,000 steps, with batch normalization of what each sigmoid takes and without; same
initial weights, batches and learning rate. Measured along training: the accuracy on
the test images, and the {15, 50, 85}th percentiles over the test images of the input
of each sigmoid in the last hidden layer. The picture shows them for one of these units,
as the paper does; the verdict takes the median over all 100.

`--data mnist` trains on MNIST as the paper did, which Keras downloads, or which
`--mnist-file` names; the default is scikit-learn's digits enlarged to 28x28.

Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift", 2015, section 4.1 and figure 1.
"""

from common import claims, drawing, gallery  # isort: skip

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import keras
import numpy as np
import tensorflow as tf
from digits import DataError, enlarged_digits, mnist

import keras_bn

CLAIM = (
    "With batch normalization the network reaches a higher test accuracy, and earlier; "
    "and the distribution of what a sigmoid takes is steadier along training."
)
KINDS = ("with BN", "without BN")
COLORS = dict(zip(KINDS, drawing.COLORS, strict=False))
HIDDEN, UNITS, CLASSES, BATCH = 3, 100, 10, 60
# Shapes of the kernels, which every seed draws anew.
KERNELS = ((784, UNITS), (UNITS, UNITS), (UNITS, CLASSES))
STEPS, EVERY = 50_000, 250
# The paper doesn't say these two.
DEVIATION, RATE = 0.1, 0.1
PERCENTILES = (15, 50, 85)
SHOWN = 0


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example(
        "first_figure", __doc__, 2, short_seeds=1, argv=argv, options=options
    )
    try:
        digits = load(example.given.data, example.given.mnist_file)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    steps = 4 * EVERY if example.short else STEPS
    networks = [Network(kind, digits) for kind in KINDS]
    figures = []
    # Steps so small leave a core idle: the two networks train side by side.
    with ThreadPoolExecutor(len(KINDS)) as pool:
        for seed in example.each(example.seeds):
            trained = pool.map(Network.train, networks, repeat(seed), repeat(steps))
            figures.append({"seed": seed, **dict(zip(KINDS, trained, strict=True))})
    example.table(
        f"{len(digits.x_train)} images of {example.given.data}, {steps} steps, median",
        [
            "",
            "test accuracy",
            "best without BN reached",
            "median moves",
            "spread grows",
        ],
        [
            [
                kind,
                f"{np.median(accuracy(figures, kind)):.2%}",
                f"step {np.median(reached(figures, kind)):.0f}",
                f"{np.median(each(figures, kind, 'moves')):.2f} spreads",
                f"{np.median(each(figures, kind, 'spread_range')):.1f} times",
            ]
            for kind in KINDS
        ],
    )
    parts = parts_of(figures)
    picture = draw(figures, example.given.data)
    return example.conclude(CLAIM, parts, figures, picture)


def options(parser):
    """The study's own arguments."""
    parser.add_argument(
        "--data",
        choices=["digits", "mnist"],
        default="digits",
        help="digits: scikit-learn's, enlarged to 28x28; mnist: as the paper "
        "(%(default)s)",
    )
    parser.add_argument(
        "--mnist-file",
        metavar="PATH",
        help="with --data mnist, a local mnist.npz instead of the download",
    )


def load(name, path):
    """The images and classes, as `studies.common.data.Data`."""
    if name == "mnist":
        return mnist(path)
    if path:
        raise DataError(f"--mnist-file goes with --data mnist, not --data {name}")
    return enlarged_digits()


class Network:
    """The network of one kind. It is compiled once, for all seeds."""

    def __init__(self, kind, digits):
        """Build it.

        Args:
            kind: one of KINDS.
            digits: `studies.common.data.Data`.
        """
        self._digits = digits
        training = len(digits.x_train)
        self._test = np.arange(training, training + len(digits.x_val))
        images = np.concatenate([digits.x_train, digits.x_val]).astype("float32")
        # A batch is the numbers of its images, so that handing 50,000 of them to Keras
        # costs nothing.
        index = keras.Input((), dtype="int32")
        lookup = keras.layers.Embedding(*images.shape, trainable=False)
        x = lookup(index)
        lookup.set_weights([images])
        for _ in range(HIDDEN):
            x = keras.layers.Dense(UNITS, use_bias=kind == "without BN")(x)
            if kind == "with BN":
                x = keras_bn.BatchNormalization(momentum=0.9)(x)
            taken, x = x, keras.layers.Activation("sigmoid")(x)
        scores = keras.layers.Dense(CLASSES)(x)
        self._probe = keras.Model(index, [taken, scores])
        self._model = keras.Model(index, scores)
        self._model.compile(
            keras.optimizers.SGD(RATE),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=EVERY,
        )
        self._start = self._model.get_weights()

    def train(self, seed, steps):
        """Draw weights, and train.

        Args:
            seed: of the weights and the order of the images.
            steps: how many batches.

        Returns:
            A dict of lists along training: `steps`, test `accuracy`, `percentiles` of
            what the unit SHOWN takes; and the medians over the units of `moves` and
            `spread_range`, as `steadiness` has them.
        """
        rng = np.random.default_rng(seed)
        self._model.set_weights(
            [
                rng.normal(0, DEVIATION, w.shape) if w.shape in KERNELS else w
                for w in self._start
            ]
        )
        training = len(self._digits.x_train)
        epochs = -(-steps * BATCH // training)
        order = np.concatenate([rng.permutation(training) for _ in range(epochs)])
        order = order[: steps * BATCH].astype("int32").reshape(steps, BATCH)
        watch = Watch(self._probe, self._test, self._digits.y_val)
        # Batches that are cut already: `fit` would gather each of them.
        batches = tf.data.Dataset.from_tensor_slices(
            (order, self._digits.y_train[order])
        )
        self._model.fit(
            batches,
            epochs=steps // EVERY,
            steps_per_epoch=EVERY,
            shuffle=False,
            verbose=0,
            callbacks=[watch],
        )
        percentiles = np.array(watch.percentiles)
        moves, spread_range = steadiness(percentiles)
        return {
            "steps": np.arange(1, len(percentiles) + 1) * EVERY,
            "accuracy": watch.accuracy,
            "percentiles": percentiles[:, :, SHOWN],
            "moves": np.median(moves),
            "spread_range": np.median(spread_range),
        }


class Watch(keras.callbacks.Callback):
    """Notes test accuracy and percentiles after each epoch."""

    def __init__(self, probe, images, classes):
        super().__init__()
        self._probe, self._images, self._classes = probe, images, classes
        self.accuracy, self.percentiles = [], []

    def on_epoch_end(self, epoch, logs=None):
        taken, scores = self._probe.predict_on_batch(self._images)
        self.accuracy.append(np.mean(scores.argmax(-1) == self._classes))
        self.percentiles.append(np.percentile(taken, PERCENTILES, axis=0))


def steadiness(percentiles):
    """How much the distributions of the units change along training.

    Args:
        percentiles: array of shape (times, percentiles, units).

    Returns:
        `(moves, spread_range)`, of shape (units,). `moves` is the standard deviation
        along training of the median, in units of the mean spread, which is the distance
        between the outer percentiles; `spread_range` is the largest spread over the
        smallest.
    """
    low, middle, high = percentiles.swapaxes(0, 1)
    spread = high - low
    return middle.std(0) / spread.mean(0), spread.max(0) / spread.min(0)


def accuracy(figures, kind):
    """The mean test accuracy over the last tenth of training, one per seed."""
    curves = np.array([seed[kind]["accuracy"] for seed in figures])
    return curves[:, -max(1, curves.shape[1] // 10) :].mean(1)


def reached(figures, kind):
    """The step at which the best accuracy without BN is reached, one per seed."""
    steps = []
    for seed in figures:
        there = np.array(seed[kind]["accuracy"]) >= max(seed["without BN"]["accuracy"])
        steps.append(seed[kind]["steps"][there.argmax()] if there.any() else np.inf)
    return np.array(steps)


def each(figures, kind, key):
    return np.array([seed[kind][key] for seed in figures])


def parts_of(figures):
    def ratio(key):
        return each(figures, "with BN", key) / each(figures, "without BN", key)

    return [
        claims.Part(
            "higher: test accuracy at the end, with BN - without",
            accuracy(figures, "with BN") - accuracy(figures, "without BN"),
            above=0,
            form="{:.2%}",
        ),
        claims.Part(
            "earlier: steps to the best accuracy without BN, with BN / without",
            reached(figures, "with BN") / reached(figures, "without BN"),
            below=1,
            form="{:.3f}",
        ),
        claims.Part(
            "steadier: how far the median moves, in spreads, with BN / without",
            ratio("moves"),
            below=1,
        ),
        claims.Part(
            "steadier: largest spread over smallest, with BN / without",
            ratio("spread_range"),
            below=1,
        ),
    ]


def draw(figures, name):
    """The paper's figure: accuracy, and the percentiles of one unit."""
    ends = [f"{np.median(accuracy(figures, kind)):.1%}" for kind in KINDS]
    steps = figures[0]["with BN"]["steps"]
    figure, axes = drawing.new_figure(
        f"With batch normalization the test accuracy is {ends[0]} after {steps[-1]} "
        f"steps, without {ends[1]}\n({name}, median of {len(figures)} seeds; "
        "percentiles of one seed)",
        [["accuracy", *KINDS]],
        size=(14, 5),
    )
    axes["with BN"].sharey(axes["without BN"])
    for kind, color in COLORS.items():
        curves = np.array([seed[kind]["accuracy"] for seed in figures])
        axes["accuracy"].plot(steps, curves.T, color=color, alpha=0.25, lw=0.8)
        middle = np.median(curves, axis=0)
        axes["accuracy"].plot(steps, middle, color=color, lw=2, label=kind)
        low, median, high = np.transpose(figures[0][kind]["percentiles"])
        axes[kind].fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        axes[kind].plot(steps, median, color=color, lw=2)
        for edge in (low, high):
            axes[kind].plot(steps, edge, color=color, lw=0.8)
        title = f"{kind}: input of a sigmoid, last hidden layer"
        drawing.tidy(axes[kind], f"{title}\n15th, 50th and 85th percentile", "step")
    drawing.percent(axes["accuracy"])
    axes["accuracy"].legend(frameon=False, loc="lower right")
    drawing.tidy(axes["accuracy"], "Test accuracy", "step")
    return figure


if __name__ == "__main__":
    sys.exit(main())
