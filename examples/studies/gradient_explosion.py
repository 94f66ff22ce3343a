"""Gradients grow by a fixed factor per layer where batch normalization is in depth.

Networks of dense layers without bias, each followed by batch normalization and ReLU,
as they are before the first training step: 1024 units, Gaussian weights and inputs.
Measured: how fast the squared norm of the kernels' gradients grows from one layer to
the one below it, as the slope of a straight line through its logarithm, for several
depths and batch sizes; and the variance after ReLU, of the variance before it. In the
limit of wide layers and large batches the theory says pi / (pi - 1) = 1.467 and
(pi - 1) / (2 pi) = 0.341. For wide layers and a batch of any size, `growth_in_theory`
computes the factor.

The limit is reached slowly in deep networks. In it all images keep the same norm. If an
image has r times the mean square of the others, the next layer gives it about
r + 0.117 (r - 1)^2 times: nothing brings a norm back that is too large. The noise of a
finite width is enough to set some images off after (width)^(1/3) layers or so, and they
take variance from the others: `variance_in_theory` says how much. So the deepest
networks are measured with 2048 units, too.
Residual connections prevent the growth of gradients: see `identity_bias.py`.

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
UNITS, WIDER, CLASSES = 1024, 2048, 10
# With momentum 0, the moving statistics are those of the last batch.
OPTIONS = {"momentum": 0.0, "epsilon": 1e-6, "center": False, "scale": False}
DEPTHS, BATCHES = (10, 30, 50), (32, 256, 1024)


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("gradient_explosion", __doc__, 3, argv=argv)
    depths = DEPTHS[:1] if example.short else DEPTHS
    batches = BATCHES[:2] if example.short else BATCHES
    jobs = [(UNITS, *job) for job in itertools.product(depths, batches)]
    if not example.short:
        jobs.append((WIDER, depths[-1], batches[-1]))
    networks = {size: Network(*size) for size in dict.fromkeys(job[:2] for job in jobs)}
    found = {
        (seed, *job): networks[job[:2]].measure(seed, job[2])
        for seed, job in example.each(itertools.product(example.seeds, jobs))
    }
    figures = [
        {
            "seed": seed,
            "found": [
                {"units": units, "depth": depth, "batch": batch}
                | found[seed, units, depth, batch]
                for units, depth, batch in jobs
            ],
        }
        for seed in example.seeds
    ]
    theory = {batch: growth_in_theory(batch) for batch in batches}
    example.table(
        f"Median; in theory the variance is {VARIANCE:.3f} for wide layers",
        ["layers", "units", "batch", "growth per layer", "in theory", "variance"],
        [
            [
                depth,
                units,
                batch,
                f"{np.median(each(figures, 'growth', units, depth, batch)):.3f}",
                f"{theory[batch]:.3f}",
                f"{np.median(each(figures, 'variance', units, depth, batch)):.3f}",
            ]
            for units, depth, batch in jobs
        ],
    )
    parts = parts_of(figures, depths, theory)
    return example.conclude(CLAIM, parts, figures, draw(figures, depths, theory))


class Gradients(keras.optimizers.Optimizer):
    """After a step with this optimizer, each variable holds its own gradient."""

    def update_step(self, gradient, variable, learning_rate):
        """Store the gradient."""
        self.assign(variable, gradient)


class Norms(keras.layers.Layer):
    """Passes its input on, and notes how far the norms of its rows differ.

    `alike` is the mean of the norms over the root of the mean square: 1 if all rows
    have the same norm, less if not.
    """

    def __init__(self):
        """Make it; `alike` is not known before a call."""
        super().__init__()
        self.alike = self.add_weight(shape=(), trainable=False, name="alike")

    def call(self, x):
        """Note the norms; returns x."""
        squares = ops.mean(ops.square(x), -1)
        self.alike.assign(ops.mean(ops.sqrt(squares)) / ops.sqrt(ops.mean(squares)))
        return x


class Network:
    """A network of one size, and what is measured of it."""

    def __init__(self, units, depth):
        """Build it.

        Args:
            units: how many units a layer has.
            depth: how many dense layers are normalized.
        """
        self._units, self._norms = units, [Norms() for _ in range(depth)]
        inputs = x = keras.Input((units,))
        for norms in self._norms:
            x = keras.layers.Dense(units, use_bias=False)(x)
            x = norms(keras_bn.BatchNormalization(**OPTIONS)(x))
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
            `variances`, after the ReLU of each layer but the last, of units that have a
            variance of 1 before; `variance`, their mean; and the same two, `for_norms`,
            that `variance_in_theory` gives for the norms of the images there.
        """
        rng = np.random.default_rng(seed)
        kernels = self._model.trainable_variables
        for kernel in kernels:
            values = rng.standard_normal(kernel.shape, "float32")
            kernel.assign(values / np.sqrt(kernel.shape[0], dtype="float32"))
        x = rng.standard_normal((batch, self._units), "float32")
        self._model.train_on_batch(x, rng.integers(CLASSES, size=batch))
        # The inputs are not what comes out of a ReLU: the first kernel is another case.
        squares = [float(ops.sum(ops.square(k))) for k in kernels[1:-1]]
        # The kernels have variance 1 / units: what a layer takes has the variance of
        # what they give.
        variances = [
            float(ops.mean(layer.moving_variance))
            for layer in self._model.layers
            if isinstance(layer, keras_bn.BatchNormalization)
        ][1:]
        alike = np.array([float(norms.alike) for norms in self._norms[:-1]])
        slope, _ = np.polyfit(range(len(squares)), np.log(squares), 1)
        return {
            "squares": squares,
            "growth": np.exp(-slope),
            "variances": variances,
            "variance": np.mean(variances),
            "variances_for_norms": variance_in_theory(alike),
            "variance_for_norms": np.mean(variance_in_theory(alike)),
        }


def variance_in_theory(alike=1.0):
    """The variance after ReLU in wide networks, of units with a variance of 1 before.

    Image a gives the units numbers of variance r_a, whose mean over the images is 1:
    after ReLU their mean is sqrt(r_a / (2 pi)), and their mean square r_a / 2. The
    variance over the images is 1/2 less the square of the mean over all.

    Args:
        alike: the mean of sqrt(r_a), as `Norms` has it. 1 gives the limit.
    """
    return (1 - alike**2 / np.pi) / 2


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


def each(figures, key, units, depth, batch):
    """What was measured in networks of one size at one batch, one per seed."""
    size = {"units": units, "depth": depth, "batch": batch}
    return np.array(
        [
            one[key]
            for seed in figures
            for one in seed["found"]
            if size.items() <= one.items()
        ]
    )


def parts_of(figures, depths, theory):
    small, large = min(theory), max(theory)
    deep = depths[-1]

    def off(key, expected, depth, batch=large, units=UNITS):
        return np.abs(each(figures, key, units, depth, batch) / expected - 1)

    def part(says, values, below=TOLERANCE):
        return claims.Part(says, values, below=below, form="{:.1%}")

    variance = each(figures, "variance", UNITS, deep, large)
    by_norms = each(figures, "variance_for_norms", UNITS, deep, large)
    parts = [
        *(
            part(
                f"growth over {depth} layers at {large} images, off 1.467",
                off("growth", GROWTH, depth),
            )
            for depth in depths
        ),
        part(
            f"growth at {small} images, off the theory for {small}",
            off("growth", theory[small], deep, small),
        ),
        claims.Part(
            f"growth over {deep} layers, {small} images over {large}",
            each(figures, "growth", UNITS, deep, small)
            / each(figures, "growth", UNITS, deep, large),
            above=1,
            form="{:.3f}",
        ),
        *(
            part(
                f"variance after ReLU over {depth} layers at {large} images, off 0.341",
                off("variance", VARIANCE, depth),
            )
            for depth in depths[:2]
        ),
        part(
            f"variance after ReLU over {deep} layers, off the theory for the norms",
            np.abs(variance / by_norms - 1),
            below=TOLERANCE / 3,
        ),
    ]
    if deep == DEPTHS[-1]:
        parts.append(
            part(
                f"variance after ReLU over {deep} layers of {WIDER} units, off 0.341",
                off("variance", VARIANCE, deep, units=WIDER),
            )
        )
        parts += [
            claims.Part(
                f"{key} over {deep} layers, off the limit: {WIDER} units over {UNITS}",
                off(key, limit, deep, units=WIDER) / off(key, limit, deep),
                below=1,
            )
            for key, limit in (("growth", GROWTH), ("variance", VARIANCE))
        ]
    return parts


def draw(figures, depths, theory):
    """Gradients by layer, the growth against the batch size, variances by layer."""
    batches = list(theory)
    deep, large = depths[-1], batches[-1]
    growth = np.median(each(figures, "growth", UNITS, deep, large))
    figure, axes = drawing.new_figure(
        f"Toward the input, squared gradients grow {growth:.3f} times a layer at "
        f"batches of {large}, {deep} layers; theory: {GROWTH:.3f}\n"
        f"({UNITS} units, before training, median and range of {len(figures)} seeds)",
        [["layers", "growth", "variance"]],
        size=(17, 5.4),
    )
    axis = axes["layers"]
    for batch, color in zip((batches[0], large), drawing.COLORS[1::-1], strict=True):
        squares = each(figures, "squares", UNITS, deep, batch)
        layers = np.arange(squares.shape[1]) + 2
        label = f"batch of {batch}"
        drawing.band(axis, layers, squares / squares[:, -1:], color, label, ms=3, lw=1)
    axis.plot(
        layers, GROWTH ** (deep - layers), "k--", lw=1, label=f"{GROWTH:.3f} a layer"
    )
    axis.set_yscale("log")
    axis.legend(frameon=False)
    title = f"Squared gradient of the kernels, {deep} layers; last layer: 1"
    drawing.tidy(axis, title, "layer (1: next to the input)")
    axis = axes["growth"]
    for depth, color in zip(depths, drawing.COLORS[2:], strict=False):
        values = [each(figures, "growth", UNITS, depth, batch) for batch in batches]
        label = f"{depth} layers"
        drawing.band(axis, batches, np.stack(values, 1), color, label, ms=5, lw=1)
    axis.plot(
        batches, list(theory.values()), "k:", lw=1.5, label="theory at this batch"
    )
    axis.axhline(GROWTH, color="k", ls="--", lw=1, label="large batches")
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, map(str, batches))
    axis.legend(frameon=False)
    drawing.tidy(axis, "Growth per layer", "images in a batch")
    axis = axes["variance"]
    layers = np.arange(1, deep)
    for units, color in zip((UNITS, WIDER), drawing.COLORS, strict=False):
        values = each(figures, "variances", units, deep, large)
        if not values.size:
            continue
        drawing.band(axis, layers, values, color, f"{units} units", ms=3, lw=1)
        norms = np.median(each(figures, "variances_for_norms", units, deep, large), 0)
        axis.plot(layers, norms, "k:", lw=1)
    axis.plot([], [], "k:", lw=1, label="theory for the norms of the images")
    axis.axhline(VARIANCE, color="k", ls="--", lw=1, label="wide layers")
    axis.legend(frameon=False)
    drawing.tidy(axis, f"Variance after ReLU, {deep} layers, batch of {large}", "layer")
    return figure


if __name__ == "__main__":
    sys.exit(main())
