"""On padded sequences batch normalization needs the mask.

The task is the largest of 1 to 16 digits: a sequence of images, most of them short, all
of a batch padded to its longest. A recurrent network and a small transformer block
learn it, each with the mask given to its normalizations and without. All else, the
recurrence, the attention and the pooling, has the mask either way. Measured: how far
more padding of the same sequences moves the answers in training; validation accuracy;
and accuracy after recalibration on training sequences that are padded four times as
long.

Sources: Laurent et al., "Batch Normalized Recurrent Neural Networks", 2016, for where
the normalization is in a recurrent network; Shen et al., "PowerNorm: Rethinking Batch
Normalization in Transformers", 2020, for how unsteady the statistics of such batches
are.
"""

from common import claims, data, drawing, gallery, restart  # isort: skip

import itertools
import sys

import keras
import numpy as np
from keras import layers
from matplotlib.ticker import PercentFormatter

import keras_bn

CLAIM = (
    "With the mask, batch normalization on padded sequences does not see the padding; "
    "without it, padding moves the answers, costs accuracy, and costs more when there "
    "is more of it."
)
LONGEST, BATCH, UNITS = 16, 64, 32
# Padded lengths that the same sequences are given.
LENGTHS = (16, 20, 24, 32, 48, 64)
NETWORKS = ("recurrent", "transformer")
KINDS = ("mask", "no mask")
COLORS = dict(zip(KINDS, drawing.COLORS, strict=False))


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("sequences", __doc__, seeds=5, short_seeds=1, argv=argv)
    steps, batches = (30, 2) if example.short else (200, 8)
    digits = data.small_digits()
    figures = [{"seed": seed} for seed in example.seeds]
    jobs = example.each(itertools.product(NETWORKS, KINDS, example.seeds))
    for network, kind, seed in jobs:
        if seed == 0:
            learner = Learner(network, kind)
        learner.restart(seed)
        learner.train(digits, steps, seed)
        figures[seed].setdefault(network, {})[kind] = learner.measured(digits, batches)
    rows = [
        (network, kind, *row([seed[network][kind] for seed in figures]))
        for network in NETWORKS
        for kind in KINDS
    ]
    header = ["network", "BN given", "answers moved", "accuracy", "recalibrated at 64"]
    example.table("Medians over the seeds", header, rows)
    return example.conclude(CLAIM, parts(figures), figures, draw(figures))


class Learner:
    """One network, compiled once for all seeds."""

    def __init__(self, network, kind):
        self.model = build(network, kind)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.Adam(3e-3), loss)
        self.restart = restart.Restart(self.model)

    def train(self, digits, steps, seed):
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            batch = sequences(digits.x_train, digits.y_train, rng, BATCH)
            self.model.train_on_batch(*batch)

    def measured(self, digits, batches):
        """The figures of what was trained; the model's statistics are others after.

        Args:
            digits: what `data.small_digits` returns.
            batches: how many to recalibrate on.
        """
        rng = np.random.default_rng(0)
        inputs, largest = sequences(digits.x_val, digits.y_val, rng, 1024)
        accuracy = self._accuracy(inputs, largest)
        batch = [part[:BATCH] for part in inputs]
        answers = [self._in_training(padded(batch, length)) for length in LENGTHS]
        moved = [float(np.abs(answer - answers[0]).mean()) for answer in answers]
        longer, _ = sequences(digits.x_train, digits.y_train, rng, batches * BATCH)
        longer = padded(longer, LENGTHS[-1])
        keras_bn.recalibrate(self.model, longer, batch_size=BATCH, verbose=0)
        return {
            "accuracy": accuracy,
            "moved": moved,
            "moved_at_most": max(moved),
            "recalibrated": self._accuracy(inputs, largest),
        }

    def _accuracy(self, inputs, largest):
        return float(np.mean(self.model.predict_on_batch(inputs).argmax(-1) == largest))

    def _in_training(self, inputs):
        """Probabilities, with the statistics of the batch."""
        return keras.ops.softmax(self.model(inputs, training=True)).numpy()


def build(network, kind):
    """A network of (images, mask) for sequences of any length.

    Args:
        network: "recurrent" or "transformer".
        kind: "mask" or "no mask", which is about its normalizations only.
    """
    images = keras.Input((None, 64))
    mask = keras.Input((None,), dtype="bool")

    def normalized(x):
        norm = keras_bn.BatchNormalization(momentum=0.9)
        return norm(x, mask=mask) if kind == "mask" else norm(x)

    x = layers.ReLU()(normalized(layers.Dense(UNITS)(images)))
    if network == "recurrent":
        # From input to hidden state; the recurrence itself is not normalized.
        x = normalized(layers.Dense(UNITS)(x))
        x = layers.GRU(UNITS)(x, mask=mask)
    else:
        attention = layers.MultiHeadAttention(num_heads=2, key_dim=UNITS // 2)
        x = normalized(x + attention(x, x, attention_mask=mask[:, None, :]))
        hidden = layers.Dense(2 * UNITS, activation="relu")(x)
        x = normalized(x + layers.Dense(UNITS)(hidden))
        x = layers.GlobalAveragePooling1D()(x, mask=mask)
    return keras.Model([images, mask], layers.Dense(10)(x))


def sequences(images, classes, rng, count):
    """Sequences of images drawn at random, and the largest digit of each.

    Args:
        images: array of shape (images, 8, 8, 1).
        classes: their digits.
        rng: a NumPy generator.
        count: how many sequences.

    Returns:
        `([inputs, mask], largest)`: inputs of shape (count, length, 64), zero where the
        mask, of shape (count, length), is False; and digits of shape (count,).
    """
    lengths = np.minimum(rng.geometric(0.25, count), LONGEST)
    mask = np.arange(lengths.max()) < lengths[:, None]
    drawn = rng.integers(len(images), size=mask.shape)
    inputs = images[drawn].reshape(*mask.shape, 64) * mask[..., None]
    return [inputs, mask], np.max(classes[drawn] * mask, axis=1)


def padded(sequences, length):
    """The same sequences, with more padding."""
    inputs, mask = sequences
    more = (0, length - mask.shape[1])
    return [np.pad(inputs, ((0, 0), more, (0, 0))), np.pad(mask, ((0, 0), more))]


def row(found):
    moved, accuracy, recalibrated = (
        np.median([one[key] for one in found])
        for key in ("moved_at_most", "accuracy", "recalibrated")
    )
    return f"{moved:.1e}", f"{accuracy:.1%}", f"{recalibrated:.1%}"


def values(figures, network, kind, key):
    """One figure of every seed."""
    return np.array([seed[network][kind][key] for seed in figures])


def parts(figures):
    """The parts of the claim."""
    made = []
    for network in NETWORKS:
        moved, accuracy, recalibrated = (
            {kind: values(figures, network, kind, key) for kind in KINDS}
            for key in ("moved_at_most", "accuracy", "recalibrated")
        )
        lost = {kind: accuracy[kind] - recalibrated[kind] for kind in KINDS}
        made += [
            claims.Part(
                f"{network}: probabilities moved, mask",
                moved["mask"],
                below=1e-5,
                form="{:.0e}",
            ),
            claims.Part(
                f"{network}: probabilities moved, no mask",
                moved["no mask"],
                above=1e-2,
                form="{:.0e}",
            ),
            claims.Part(
                f"{network}: accuracy, mask - no mask",
                accuracy["mask"] - accuracy["no mask"],
                above=0,
                form="{:.2%}",
            ),
            claims.Part(
                f"{network}: accuracy lost to more padding, no mask - mask",
                lost["no mask"] - lost["mask"],
                above=0,
                form="{:.2%}",
            ),
        ]
    return made


def draw(figures):
    """The picture: what padding does, with the mask and without."""
    lost = {
        kind: " and ".join(
            f"{np.median(accuracy - recalibrated):.1%} ({network})"
            for network in NETWORKS
            for accuracy in [values(figures, network, kind, "accuracy")]
            for recalibrated in [values(figures, network, kind, "recalibrated")]
        )
        for kind in KINDS
    }
    figure, axes = drawing.new_figure(
        "Recalibrated on sequences padded to four times the length, networks whose "
        f"normalizations have no mask lose\n{lost['no mask']} of accuracy; with the "
        f"mask {lost['mask']} (medians of {len(figures)} seeds)",
        [[f"{network} {what}" for network in NETWORKS for what in ("moved", "lost")]],
        size=(14, 4.8),
    )
    for network in NETWORKS:
        moved, lost = (axes[f"{network} {what}"] for what in ("moved", "lost"))
        for kind, color in COLORS.items():
            found = values(figures, network, kind, "moved")
            moved.plot(LENGTHS, found.T, color=color, lw=1, alpha=0.4)
            moved.plot(LENGTHS, np.median(found, axis=0), color=color, lw=3, label=kind)
            keys = ("accuracy", "recalibrated")
            found = np.array([values(figures, network, kind, key) for key in keys])
            lost.plot((0, 1), found, "o-", color=color, lw=1, alpha=0.4, mew=0)
            lost.plot((0, 1), np.median(found, axis=1), color=color, lw=3)
        moved.set_xticks(LENGTHS)
        drawing.tidy(moved, f"{network}: mean change of a probability", "padded length")
        lost.set_xticks((0, 1), ("trained", "recalibrated\nat length 64"))
        lost.set_xlim(-0.3, 1.3)
        lost.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        drawing.tidy(lost, f"{network}: validation accuracy")
    first, second = (axes[f"{network} moved"] for network in NETWORKS)
    second.sharey(first)
    axes["transformer lost"].sharey(axes["recurrent lost"])
    first.legend(frameon=False, title="BN is given")
    return figure


if __name__ == "__main__":
    sys.exit(main())
