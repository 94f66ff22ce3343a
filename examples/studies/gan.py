"""Batch normalization in both parts of a generative adversarial network helps it.

Small dense networks make and judge scikit-learn's digits: with batch normalization in
generator and discriminator, real and fake images in batches of their own; the same with
both in one batch; and without normalization, all by Adam at the same rate. Measured,
along training: the Fréchet distance between the pixels of 1000 fakes and of the real
images, and how many of the ten digits a nearest neighbour finds among the fakes.

With --gradient-penalty W the discriminator's gradient on real images is penalized,
which differentiates through the normalization twice.

Sources: Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", 2016: normalization in both parts.
Chintala, "How to Train a GAN?", 2016: separate batches. Mescheder, Geiger and Nowozin,
"Which Training Methods for GANs do actually Converge?", 2018: the penalty.
"""

from common import claims, data, drawing, gallery, restart  # isort: skip

import sys

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.neighbors import KNeighborsClassifier

import keras_bn

CLAIM = (
    "With batch normalization in both parts, and real and fake images in separate "
    "batches, samples are nearer to the real images than with mixed batches or without "
    "normalization, and all ten digits are among them."
)
KINDS = ("separate batches", "mixed batches", "no normalization")
COLORS = dict(zip(KINDS, drawing.COLORS, strict=False))
MEASURED = ("distance", "digits")
NOISE, BATCH, FAKES = 32, 60, 1000


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("gan", __doc__, seeds=5, argv=argv, options=_options)
    rounds, epochs = (2, 5) if example.short else (12, 10)
    digits = data.small_digits()
    judge = Judge(digits)
    figures = [{"seed": seed} for seed in example.seeds]
    samples = {}
    for kind, seed in example.each((k, s) for k in KINDS for s in example.seeds):
        if seed == 0:
            pair = Pair(kind, example.given.gradient_penalty)
        pair.restart(seed)
        rng = np.random.default_rng(seed)
        distances = []
        for _ in range(rounds):
            for _ in range(epochs):
                pair.epoch(digits.x_train, rng)
            fakes = pair.samples(rng)
            distances.append(judge.distance(fakes))
        samples.setdefault(kind, fakes)
        figures[seed][kind] = {
            "distances": distances,
            "distance": distances[-1],
            "digits": judge.digits(fakes),
        }
    rows = [
        [kind, *(f"{np.median(values(figures, kind, k)):.3g}" for k in MEASURED)]
        for kind in KINDS
    ]
    rows.append(["real images that were held back", f"{judge.real_distance:.3g}", ""])
    header = ["", "Fréchet distance", "digits of ten"]
    example.table("Medians over the seeds", header, rows)
    picture = draw(figures, samples, digits, judge, epochs)
    return example.conclude(CLAIM, parts(figures), figures, picture)


def _options(parser):
    parser.add_argument(
        "--gradient-penalty",
        type=float,
        default=0.0,
        metavar="W",
        help="weight of the penalty on the discriminator's gradient (%(default)s)",
    )


class Pair:
    """A generator and a discriminator."""

    def __init__(self, kind, penalty):
        """Build both.

        Args:
            kind: one of `KINDS`.
            penalty: weight of the gradient penalty.
        """
        normalized = kind != "no normalization"
        self._mixed = kind == "mixed batches"
        self.penalty = penalty
        self._generator = _network(NOISE, [64, 128, 128], "relu", normalized)
        self._generator.add(layers.Dense(64, activation="sigmoid"))
        self._discriminator = _network(64, [128, 64], "leaky_relu", normalized)
        self._discriminator.add(layers.Dense(1))
        parts = self._generator, self._discriminator
        for part in parts:
            part.compile(keras.optimizers.Adam(1e-3, beta_1=0.5))
        self.restart = restart.Restart(*parts)
        self._compiled = tf.function(self._epoch)

    def epoch(self, images, rng):
        """Go through the real images once."""
        order = rng.permutation(len(images)).reshape(-1, BATCH)
        noise = rng.normal(size=(len(order), BATCH, NOISE)).astype("float32")
        self._compiled(images.reshape(-1, 64)[order], noise)

    def samples(self, rng):
        """Fakes, made in inference: an array of shape (FAKES, 64)."""
        noise = rng.normal(size=(FAKES, NOISE)).astype("float32")
        return self._generator.predict_on_batch(noise)

    def _epoch(self, real, noise):
        for step in tf.range(len(real)):
            self._step(real[step], noise[step])

    def _step(self, real, noise):
        with tf.GradientTape() as for_generator, tf.GradientTape() as for_discriminator:
            fake = self._generator(noise, training=True)
            judged_real, judged_fake, penalty = self.judge(real, fake)
            fooling = tf.reduce_mean(tf.nn.softplus(-judged_fake))
            telling = tf.reduce_mean(
                tf.nn.softplus(-judged_real) + tf.nn.softplus(judged_fake)
            )
            telling += self.penalty * penalty
        for part, tape, loss in (
            (self._generator, for_generator, fooling),
            (self._discriminator, for_discriminator, telling),
        ):
            gradients = tape.gradient(loss, part.trainable_variables)
            part.optimizer.apply(gradients, part.trainable_variables)

    def judge(self, real, fake):
        """What the discriminator says of real and fake, and the penalty.

        Returns:
            `(judged_real, judged_fake, penalty)`: logits of shape (batch, 1), and the
            squared norm of the gradient at a real image, as a mean; 0 if not asked for.
        """
        with tf.GradientTape() as tape:
            tape.watch(real)
            if self._mixed:
                both = self._discriminator(tf.concat([real, fake], 0), training=True)
                judged_real, judged_fake = tf.split(both, 2)
            else:
                judged_real = self._discriminator(real, training=True)
                judged_fake = self._discriminator(fake, training=True)
            total = tf.reduce_sum(judged_real)
        if not self.penalty:
            return judged_real, judged_fake, 0.0
        gradient = tape.gradient(total, real)
        penalty = tf.reduce_mean(tf.reduce_sum(gradient**2, axis=1))
        return judged_real, judged_fake, penalty


def _network(inputs, units, activation, normalized):
    model = keras.Sequential([keras.Input((inputs,))])
    for number in units:
        model.add(layers.Dense(number))
        if normalized:
            model.add(keras_bn.BatchNormalization(momentum=0.9))
        model.add(layers.Activation(activation))
    return model


class Judge:
    """Compares fakes with the real images."""

    def __init__(self, digits):
        real = digits.x_train.reshape(-1, 64)
        self._real = _normal(real)
        self._neighbour = KNeighborsClassifier(1).fit(real, digits.y_train)
        # As near as fakes can be expected to come.
        self.real_distance = self.distance(digits.x_val.reshape(-1, 64))

    def distance(self, images):
        """Fréchet distance of two normal distributions, fitted to images and real."""
        mean, covariance = _normal(images)
        real_mean, real_covariance = self._real
        # The trace of a square root, from the eigenvalues of what is under it.
        eigenvalues = np.linalg.eigvals(covariance @ real_covariance).real
        root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
        spread = np.trace(covariance) + np.trace(real_covariance) - 2 * root
        return float(np.sum((mean - real_mean) ** 2) + spread)

    def digits(self, images):
        """How many of the ten digits each make up 1% of the images or more."""
        found = np.bincount(self._neighbour.predict(images), minlength=10)
        return int(np.sum(found >= 0.01 * len(images)))


def _normal(images):
    """Mean and covariance."""
    return images.mean(axis=0), np.cov(images, rowvar=False)


def values(figures, kind, key):
    """One figure of every seed."""
    return np.array([seed[kind][key] for seed in figures])


def parts(figures):
    """The parts of the claim."""
    distance = {kind: values(figures, kind, "distance") for kind in KINDS}
    separate, mixed, none = distance.values()
    return [
        claims.Part("distance, separate batches / none", separate / none, below=1),
        claims.Part("distance, separate / mixed batches", separate / mixed, below=1),
        claims.Part(
            "digits made, of ten", values(figures, KINDS[0], "digits"), above=9
        ),
    ]


def draw(figures, samples, digits, judge, epochs):
    """The picture: samples, and how near they are."""
    distances = (
        f"{np.median(values(figures, kind, 'distance')):.2g} with {kind}"
        for kind in KINDS
    )
    figure, axes = drawing.new_figure(
        "Batch normalization in both parts of a GAN: Fréchet distance to real images\n"
        f"{', '.join(distances)} (medians of {len(figures)} seeds)",
        [["real", *KINDS], ["distance", "distance", "digits", "digits"]],
        size=(13, 7.8),
    )
    for name, images in {"real": digits.x_val, **samples}.items():
        _grid(axes[name], images)
        axes[name].set_title("real images" if name == "real" else name)
    axis = axes["distance"]
    for kind, color in COLORS.items():
        found = values(figures, kind, "distances")
        at = epochs * np.arange(1, found.shape[1] + 1)
        axis.plot(at, found.T, color=color, lw=1, alpha=0.4)
        axis.plot(at, np.median(found, axis=0), color=color, lw=3, label=kind)
    axis.axhline(judge.real_distance, color="#777", ls="--", label="real, held back")
    axis.set_yscale("log")
    axis.legend(frameon=False, ncols=2, loc="center right", bbox_to_anchor=(1, 0.68))
    drawing.tidy(axis, "Fréchet distance to the real images", "epoch")
    for number, (kind, color) in enumerate(COLORS.items()):
        drawing.dots(axes["digits"], number, values(figures, kind, "digits"), color)
    axes["digits"].set_xticks(range(len(KINDS)), KINDS)
    axes["digits"].set_ylim(0, 10.5)
    drawing.tidy(axes["digits"], "Digits of ten that are at least 1% of the samples")
    return figure


def _grid(axis, images, side=8):
    """Draw the first images as a square."""
    square = images[: side * side].reshape(side, side, 8, 8)
    square = np.pad(square, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.35)
    square = square.swapaxes(1, 2).reshape(side * 10, side * 10)
    axis.imshow(square, cmap="gray_r", vmin=0, vmax=1)
    axis.set_axis_off()


if __name__ == "__main__":
    sys.exit(main())
