"""Gradients grow by a fixed factor per layer where batch normalization is in depth.

Networks of dense layers without bias, each followed by batch normalization and ReLU,
as they are before the first training step: 1024 units, Gaussian weights and inputs.
Measured: how fast the squared norm of the kernels' gradients grows from one layer to
the one below it, as the slope of a straight line through its logarithm, for several
depths and batch sizes; and the variance after ReLU, of the variance before it. In the
limit of wide layers and large batches the theory says pi / (pi - 1) = 1.467 and
(pi - 1) / (2 pi) = 0.341. For wide layers and a batch of any size, `growth_in_theory`
computes the factor. The theory takes the width to infinity before the batch; with a
batch as large as the width, deep networks are expected to differ somewhat.
Residual connections prevent this growth: see `identity_bias.py`.

Source: Yang, Pennington, Rao, Sohl-Dickstein and Schoenholz, "A Mean Field Theory of
Batch Normalization", 2019.
"""

from common import claims, drawing, gallery  # isort: skip

import itertools
import sys

import keras
import numpy as np
from keras import ops

import keras_bn

CLAIM = (
    "Before training, the squared norm of the gradient grows by pi / (pi - 1) = 1.467 "
    "a layer toward the input at large batches, and faster at small ones; the variance "
    "after ReLU is (pi - 1) / (2 pi) = 0.341 of that before."
)
GROWTH = np.pi / (np.pi - 1)
VARIANCE = (np.pi - 1) / (2 * np.pi)
TOLERANCE = 0.03
UNITS, CLASSES = 1024, 10
# With momentum 0, the moving statistics are those of the last batch.
OPTIONS = {"momentum": 0.0, "epsilon": 1e-6, "center": False, "scale": False}
DEPTHS, BATCHES = (10, 30, 50), (32, 64, 128, 256, 1024)


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("gradient_explosion", __doc__, 3, argv=argv)
    depths = DEPTHS[:1] if example.short else DEPTHS
    batches = BATCHES[:4:3] if example.short else BATCHES
    networks = {depth: Network(depth) for depth in depths}
    found = {
        (seed, depth, batch): networks[depth].measure(seed, batch)
        for seed, depth, batch in example.each(
            itertools.product(example.seeds, depths, batches)
        )
    }
    figures = [
        {
            "seed": seed,
            "depths": {d: {b: found[seed, d, b] for b in batches} for d in depths},
        }
        for seed in example.seeds
    ]
    theory = {batch: growth_in_theory(batch) for batch in batches}
    example.table(
        f"Growth per layer, median (large batches in theory: {GROWTH:.3f})",
        ["batch", "theory", *(f"{depth} layers" for depth in depths)],
        [
            [
                batch,
                f"{theory[batch]:.3f}",
                *(f"{np.median(growths(figures, d, batch)):.3f}" for d in depths),
            ]
            for batch in batches
        ],
    )
    parts = parts_of(figures, depths, theory)
    return example.conclude(CLAIM, parts, figures, draw(figures, depths, theory))


class Gradients(keras.optimizers.Optimizer):
    """After a step with this optimizer, each variable holds its own gradient."""

    def update_step(self, gradient, variable, learning_rate):
        """Store the gradient."""
        self.assign(variable, gradient)


class Network:
    """A network of one depth, and what is measured of it."""

    def __init__(self, depth):
        """Build it.

        Args:
            depth: how many dense layers are normalized.
        """
        inputs = x = keras.Input((UNITS,))
        for _ in range(depth):
            x = keras.layers.Dense(UNITS, use_bias=False)(x)
            x = keras_bn.BatchNormalization(**OPTIONS)(x)
            x = keras.layers.ReLU()(x)
        x = keras.layers.Dense(CLASSES, use_bias=False)(x)
        self._model = keras.Model(inputs, x)
        self._model.compile(
            Gradients(learning_rate=1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            run_eagerly=True,  # Each batch size is used a few times only.
        )

    def measure(self, seed, batch):
        """Draw weights and a batch, and measure.

        Args:
            seed: of the draw.
            batch: size of the batch.

        Returns:
            A dict: `squares`, the squared norm of each kernel's gradient from the
            second layer on; `growth`, the factor from a layer to the one below it;
            `variance`, the mean variance that arrives at the normalizations from the
            second on. They follow weights of variance 1 / UNITS: it is the variance
            after ReLU of units that have a variance of 1 before.
        """
        rng = np.random.default_rng(seed)
        kernels = self._model.trainable_variables
        for kernel in kernels:
            values = rng.standard_normal(kernel.shape, "float32")
            kernel.assign(values / np.sqrt(kernel.shape[0]))
        x = rng.standard_normal((batch, UNITS), "float32")
        self._model.train_on_batch(x, rng.integers(CLASSES, size=batch))
        # The inputs are not what comes out of a ReLU: the first kernel is another case.
        squares = [float(ops.sum(ops.square(k))) for k in kernels[1:-1]]
        variances = [
            float(ops.mean(layer.moving_variance))
            for layer in self._model.layers
            if isinstance(layer, keras_bn.BatchNormalization)
        ]
        slope, _ = np.polyfit(range(len(squares)), np.log(squares), 1)
        return {
            "squares": squares,
            "growth": np.exp(-slope),
            "variance": np.mean(variances[1:]),
        }


def growth_in_theory(batch, draws=10_000):
    """The growth per layer in wide networks, for a batch of this size.

    What is normalized is Gaussian, isotropic but for the mean over the batch, so that
    the normalized x is uniform on the sphere of |x|^2 = batch and mean 0. The gradient
    that arrives, g, is isotropic but for its mean, 0 too. With D the derivative of
    ReLU at x and P the projection off the ones and off x, normalization passes on
    P D g / s, where s^2 is the variance of the batch: the factor is
    E tr(P D (I - 11'/batch) D P) / (batch - 1) times E 1/s^2.

    Args:
        batch: the number of images.
        draws: of the Monte Carlo estimate.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((draws, batch))
    x -= x.mean(1, keepdims=True)
    x *= np.sqrt(batch / np.sum(x * x, 1, keepdims=True))
    positive = np.maximum(x, 0)
    count = np.sum(x > 0, 1)
    total, squares = positive.sum(1), np.sum(positive**2, 1)
    after = np.mean(squares - total**2 / batch) / (batch - 1)
    inverse = batch / (batch - 3) / after  # E 1/s^2, of a chi-squared variable
    diagonal = count * (1 - 1 / batch) - squares / batch
    ones = (count - count**2 / batch - total**2 / batch) / batch
    return np.mean(diagonal - ones) / (batch - 1) * inverse


def growths(figures, depth, batch):
    return np.array([seed["depths"][depth][batch]["growth"] for seed in figures])


def variances(figures, depth, batch):
    return np.array([seed["depths"][depth][batch]["variance"] for seed in figures])


def parts_of(figures, depths, theory):
    small, large = min(theory), max(theory)
    deep = depths[-1]
    return [
        *(
            claims.Part(
                f"growth over {depth} layers at {large} images, off 1.467",
                np.abs(growths(figures, depth, large) / GROWTH - 1),
                below=TOLERANCE,
                form="{:.1%}",
            )
            for depth in depths
        ),
        claims.Part(
            f"growth at {small} images, off the theory for {small}",
            np.abs(growths(figures, deep, small) / theory[small] - 1),
            below=TOLERANCE,
            form="{:.1%}",
        ),
        claims.Part(
            f"growth over {deep} layers, {small} images over {large}",
            growths(figures, deep, small) / growths(figures, deep, large),
            above=1,
            form="{:.3f}",
        ),
        *(
            claims.Part(
                f"variance after ReLU over {depth} layers at {large} images, off 0.341",
                np.abs(variances(figures, depth, large) / VARIANCE - 1),
                below=TOLERANCE,
                form="{:.1%}",
            )
            for depth in depths
        ),
    ]


def draw(figures, depths, theory):
    """Gradients by layer, and the growth against the batch size."""
    batches = list(theory)
    deep, large = depths[-1], batches[-1]
    growth = np.median(growths(figures, deep, large))
    figure, axes = drawing.new_figure(
        f"Toward the input, squared gradients grow {growth:.3f} times a layer at "
        f"batches of {large}, {deep} layers; theory: {GROWTH:.3f}\n"
        f"({UNITS} units, before training, median and range of {len(figures)} seeds)",
        [["layers", "growth"]],
        size=(13, 5.4),
    )
    for batch, color in zip((batches[0], large), drawing.COLORS[1::-1], strict=True):
        squares = [seed["depths"][deep][batch]["squares"] for seed in figures]
        squares = np.array(squares) / np.array(squares)[:, -1:]
        layers = np.arange(squares.shape[1]) + 2
        label = f"batch of {batch}"
        drawing.band(axes["layers"], layers, squares, color, label, ms=3, lw=1)
    axes["layers"].plot(
        layers, GROWTH ** (deep - layers), "k--", lw=1, label=f"{GROWTH:.3f} a layer"
    )
    axes["layers"].set_yscale("log")
    axes["layers"].legend(frameon=False)
    title = f"Squared gradient of the kernels, {deep} layers; last layer: 1"
    drawing.tidy(axes["layers"], title, "layer (1: next to the input)")
    for depth, color in zip(depths, drawing.COLORS[2:], strict=False):
        values = np.stack([growths(figures, depth, batch) for batch in batches], 1)
        label = f"{depth} layers"
        drawing.band(axes["growth"], batches, values, color, label, ms=5, lw=1)
    axes["growth"].plot(
        batches, list(theory.values()), "k:", lw=1.5, label="theory at this batch"
    )
    axes["growth"].axhline(GROWTH, color="k", ls="--", lw=1, label="large batches")
    axes["growth"].set_xscale("log", base=2)
    axes["growth"].set_xticks(batches, map(str, batches))
    axes["growth"].legend(frameon=False)
    drawing.tidy(axes["growth"], "Growth per layer", "images in a batch")
    return figure


if __name__ == "__main__":
    sys.exit(main())
