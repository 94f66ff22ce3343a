"""Batch normalization allows higher learning rates and less care about initialization.

Networks of six hidden layers learn scikit-learn's digits by plain stochastic gradient
descent, with batch normalization and without, for every pair of a learning rate and a
scale of the initial weights (1 is He's). Measured: which rates and scales train at
all, the epochs until 95% of the validation images are right, validation accuracy, and
the gradient norm of every layer along training.

All of them are trained side by side as one model: see `common/parallel.py`.

Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift", 2015.
"""

from common import claims, data, drawing, gallery, parallel  # isort: skip

import sys

import keras
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

CLAIM = (
    "With batch normalization a deep network trains at higher learning rates and in "
    "fewer epochs, over wider ranges of rates and of initialization scales; its "
    "gradients depend less on that scale and are steadier from step to step; and it "
    "generalizes better."
)
RATES = 10 ** np.arange(-3, 1.6, 0.5)
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
# A run has trained if it ends with this share of the validation images right.
TRAINED = 0.9
GOAL = 0.95
KINDS = {
    "with BN": lambda: [parallel.normalization(), keras.layers.ReLU()],
    "without BN": lambda: [keras.layers.ReLU()],
}
COLORS = {"with BN": drawing.WITH, "without BN": drawing.WITHOUT}


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("convergence", __doc__, seeds=5, argv=argv)
    rates = RATES[::2] if example.short else RATES
    epochs = 4 if example.short else 12
    digits = data.small_digits()
    runs = parallel.Runs(example.seeds, SCALES, rates)
    trainers = {kind: parallel.Trainer(runs, layers) for kind, layers in KINDS.items()}
    history = {kind: [] for kind in KINDS}
    for number, kind in example.each((n, k) for n in range(epochs) for k in KINDS):
        history[kind].append(trainers[kind].epoch(digits, seed=number))
    figures = [
        {
            "seed": seed,
            **{kind: measured(runs.of(seed, history[kind]), rates) for kind in KINDS},
        }
        for seed in example.seeds
    ]
    rows = [
        (name, *(middle(figures, kind, key, form) for kind in KINDS))
        for name, key, form in (
            ("highest learning rate that trains", "highest_rate", "{:.3g}"),
            ("learning rates that train, of " + str(len(rates)), "rates", "{:.0f}"),
            ("scales of initialization that train, of 5", "scales", "{:.0f}"),
            ("epochs to 95%, at the best rate", "epochs_to_goal", "{:.0f}"),
            ("validation accuracy, at the best rate", "accuracy", "{:.1%}"),
        )
    ]
    example.table("Median over the seeds", ["", *KINDS], rows)
    return example.conclude(CLAIM, parts(figures), figures, draw(figures, rates))


def measured(history, rates):
    """The figures of one seed and kind.

    Args:
        history: what `Runs.of` returns.
        rates: the learning rates.
    """
    accuracy, norms = history
    trained = accuracy[:, :, -1] >= TRAINED
    usual = SCALES.index(1.0)
    best = np.argmax(accuracy[usual, :, -1])
    reached = accuracy[usual] >= GOAL
    epochs = np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1, np.inf)
    first = norms[:, 0, 0, :]
    # Per step, at a rate at which both kinds train; changes from the second epoch on.
    along = norms[usual, np.argmin(abs(rates - 0.1))]
    changes = np.abs(np.diff(np.log(along[parallel.STEPS :]), axis=0))
    return {
        "trained": trained.astype(int),
        "highest_rate": max(rates[trained[usual]], default=0.0),
        "rates": trained[usual].sum(),
        "scales": trained.any(axis=1).sum(),
        "epochs_to_goal": epochs.min(),
        "accuracy": accuracy[usual, best, -1],
        "best_rate": rates[best],
        "accuracies": accuracy[usual, best],
        "first_gradients": first,
        "first_gradients_span": np.log10(first.max() / first.min()),
        "gradients": np.mean(np.split(along, accuracy.shape[-1]), axis=1),
        "gradient_change": np.median(changes),
    }


def parts(figures):
    """The parts of the claim."""

    def part(says, key, compare=np.subtract, **bound):
        pairs = ((seed["with BN"][key], seed["without BN"][key]) for seed in figures)
        return claims.Part(says, [compare(*pair) for pair in pairs], **bound)

    return [
        part("highest rate that trains, ratio", "highest_rate", np.divide, above=1),
        part("rates that train, difference", "rates", above=0),
        part("scales that train, difference", "scales", above=0),
        part("epochs to 95%, ratio", "epochs_to_goal", np.divide, below=1),
        part(
            "decades of gradients over scales, difference",
            "first_gradients_span",
            below=0,
        ),
        part("gradient change per step, ratio", "gradient_change", np.divide, below=1),
        part("accuracy, difference", "accuracy", above=0, form="{:.2%}"),
    ]


def middle(figures, kind, key, form):
    return form.format(np.median([seed[kind][key] for seed in figures]))


def draw(figures, rates):
    """The picture: what trains, how fast, and the gradients."""
    highest = [middle(figures, kind, "highest_rate", "{:.2g}") for kind in KINDS]
    scales = [middle(figures, kind, "scales", "{:.0f}") for kind in KINDS]
    figure, axes = drawing.new_figure(
        f"With batch normalization learning rates up to {highest[0]} train, without it "
        f"up to {highest[1]}; {scales[0]} of {len(SCALES)} \nscales of initialization "
        f"train with it, {scales[1]} without (medians of {len(figures)} seeds)",
        [
            ["trained with BN", "trained without BN", "accuracy"],
            ["along with BN", "along without BN", "first"],
        ],
        size=(13, 7.6),
    )
    axes["along without BN"].sharey(axes["along with BN"])
    for kind in KINDS:
        _what_trains(axes[f"trained {kind}"], figures, kind, rates)
        _along(axes[f"along {kind}"], figures, kind)
    _accuracy(axes["accuracy"], figures)
    _first(axes["first"], figures)
    return figure


def _what_trains(axis, figures, kind, rates):
    share = np.mean([seed[kind]["trained"] for seed in figures], axis=0)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1.3, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(share):
        if value:
            axis.text(
                column,
                row,
                f"{value * len(figures):.0f}",
                ha="center",
                va="center",
                color="white" if value > 0.6 else "black",
            )
    axis.set_xticks(range(len(rates)), [_short(rate) for rate in rates], rotation=60)
    axis.set_yticks(range(len(SCALES)), [f"{scale:g}" for scale in SCALES])
    drawing.tidy(
        axis,
        f"{kind}: runs that reach {TRAINED:.0%}, of {len(figures)}",
        "learning rate",
        "scale of initial weights (1: He)",
        grid=None,
    )


def _short(rate):
    return np.format_float_positional(rate, precision=2, fractional=False, trim="-")


def _accuracy(axis, figures):
    for kind, color in COLORS.items():
        curves = np.array([seed[kind]["accuracies"] for seed in figures])
        epochs = range(1, curves.shape[1] + 1)
        axis.plot(epochs, curves.T, color=color, alpha=0.3, lw=1)
        axis.plot(epochs, np.median(curves, axis=0), color=color, lw=3, label=kind)
    axis.axhline(GOAL, color="#777", lw=1, ls="--")
    axis.set_ylim(0.75, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, loc="lower right")
    drawing.tidy(axis, "Validation accuracy, each at its best rate", "epoch")


def _along(axis, figures, kind):
    norms = np.median([seed[kind]["gradients"] for seed in figures], axis=0)
    shades = plt.get_cmap("viridis_r")(np.linspace(0.1, 1, parallel.HIDDEN + 1))
    for layer, shade in enumerate(shades):
        axis.plot(
            range(1, len(norms) + 1), norms[:, layer], color=shade, label=layer + 1
        )
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if kind == "without BN":
        axis.legend(frameon=False, title="layer", fontsize="small", loc="lower left")
    drawing.tidy(axis, f"{kind}: gradient norms, rate 0.1", "epoch")


def _first(axis, figures):
    for kind, color in COLORS.items():
        norms = np.median([seed[kind]["first_gradients"] for seed in figures], axis=0)
        axis.plot(SCALES, norms, "o-", color=color, ms=4, lw=1.5, alpha=0.7)
        axis.plot([], "o-", color=color, label=kind)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
    axis.legend(frameon=False)
    drawing.tidy(
        axis,
        "Gradient norms before the first step, a line per layer",
        "scale of initial weights (1: He)",
    )


if __name__ == "__main__":
    sys.exit(main())
