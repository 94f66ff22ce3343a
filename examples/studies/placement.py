"""Batch normalization belongs before the activation, not after it.

Networks of six hidden layers learn scikit-learn's digits by plain stochastic gradient
descent, with the normalization before each activation, after it, and without any; for
ReLU, tanh and sigmoid, and over learning rates. Measured: validation accuracy, as the
mean of the last four epochs, and the epochs until 95% of the validation images are
right, each place at the best of its own rates. All are trained side by side as one
model: see `common/parallel.py`.

Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift", 2015, section 3.2: what comes out of a dense layer
is nearer to a normal distribution than what comes out of an activation. Mishkin,
Sergievskiy and Matas, "Systematic evaluation of CNN advances on the ImageNet", 2017,
found the opposite.
"""

from common import claims, data, drawing, gallery, parallel  # isort: skip

import functools
import sys

import keras
import numpy as np
from matplotlib.ticker import PercentFormatter

CLAIM = (
    "Batch normalization before the activation trains in fewer epochs and ends at a "
    "better accuracy than after it, whatever the activation."
)
RATES = 10 ** np.arange(-2, 1.1, 0.5)
GOAL = 0.95
# What differs by less than one epoch does from the next says nothing.
LAST = 4
ACTIVATIONS = ("relu", "tanh", "sigmoid")
PLACES = ("before", "after", "without")
COLORS = dict(zip(PLACES, drawing.COLORS, strict=False))


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("placement", __doc__, seeds=10, argv=argv)
    activations = ACTIVATIONS[::2] if example.short else ACTIVATIONS
    rates = RATES[::2] if example.short else RATES
    epochs = 3 if example.short else 12
    digits = data.small_digits()
    runs = parallel.Runs(example.seeds, [1.0], rates)
    trained = {}
    for activation, place in example.each((a, p) for a in activations for p in PLACES):
        trainer = parallel.Trainer(runs, functools.partial(layers, activation, place))
        trained[activation, place] = [trainer.epoch(digits, n) for n in range(epochs)]
    figures = [
        {
            "seed": seed,
            **{
                activation: {
                    place: measured(runs.of(seed, trained[activation, place]), rates)
                    for place in PLACES
                }
                for activation in activations
            },
        }
        for seed in example.seeds
    ]
    rows = [
        (activation, place, *row(figures, activation, place))
        for activation in activations
        for place in PLACES
    ]
    header = ["activation", "BN", "accuracy", "lowest", "at rate", "epochs to 95%"]
    example.table("Each at its best rate, medians over the seeds", header, rows)
    parts = [
        part
        for activation in activations
        for part in (
            claims.Part(
                f"{activation}: accuracy before - after",
                pairs(figures, activation, "accuracy", np.subtract),
                above=0,
                form="{:.2%}",
            ),
            claims.Part(
                f"{activation}: epochs to 95%, before / after",
                pairs(figures, activation, "epochs_to_goal", np.divide),
                below=1,
            ),
        )
    ]
    return example.conclude(CLAIM, parts, figures, draw(figures, activations, rates))


def layers(activation, place):
    """What follows a dense layer."""
    made = [keras.layers.Activation(activation)]
    if place != "without":
        made.insert(0 if place == "before" else 1, parallel.normalization())
    return made


def measured(history, rates):
    """The figures of one seed, activation and place."""
    accuracy = next(iter(history))[0]  # Of the one scale: (rates, epochs).
    # Rounded, so that equal accuracies are.
    last = accuracy[:, -LAST:].mean(axis=1).round(9)
    best = last.argmax()
    reached = (accuracy >= GOAL).any(axis=0)
    return {
        "accuracies": last,
        "accuracy": last[best],
        "best_rate": rates[best],
        "epochs_to_goal": reached.argmax() + 1 if reached.any() else np.inf,
    }


def pairs(figures, activation, key, compare):
    return [
        compare(seed[activation]["before"][key], seed[activation]["after"][key])
        for seed in figures
    ]


def row(figures, activation, place):
    found = [seed[activation][place] for seed in figures]
    accuracies = [one["accuracy"] for one in found]
    return (
        f"{np.median(accuracies):.1%}",
        f"{min(accuracies):.1%}",
        f"{np.median([one['best_rate'] for one in found]):.2g}",
        f"{np.median([one['epochs_to_goal'] for one in found]):.1f}",
    )


def draw(figures, activations, rates):
    """The picture: accuracy against learning rate, and at the best one."""
    gains = (
        f"{np.median(pairs(figures, activation, 'accuracy', np.subtract)):+.1%} with "
        f"{activation}"
        for activation in activations
    )
    figure, axes = drawing.new_figure(
        "Batch normalization before the activation instead of after it: accuracy"
        f"\n{', '.join(gains)} (median of {len(figures)} seeds, each at its best rate)",
        [
            [f"{activation} by rate" for activation in activations],
            [f"{activation} at best" for activation in activations],
        ],
        size=(13, 7.4),
    )
    for activation in activations:
        found = {
            place: [seed[activation][place] for seed in figures] for place in PLACES
        }
        _by_rate(axes[f"{activation} by rate"], activation, found, rates)
        _at_best(axes[f"{activation} at best"], activation, found)
    axes[f"{activations[0]} by rate"].legend(frameon=False, loc="lower left")
    return figure


def _by_rate(axis, activation, found, rates):
    for place, seeds in found.items():
        accuracies = np.array([seed["accuracies"] for seed in seeds])
        color = COLORS[place]
        axis.plot(rates, accuracies.T, ".", color=color, alpha=0.4, mew=0)
        axis.plot(rates, np.median(accuracies, axis=0), color=color, lw=3, label=place)
    axis.set_xscale("log")
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    title = f"{activation}: validation accuracy at each rate"
    drawing.tidy(axis, title, "learning rate")


def _at_best(axis, activation, found):
    for number, (place, seeds) in enumerate(found.items()):
        drawing.dots(axis, number, [seed["accuracy"] for seed in seeds], COLORS[place])
    axis.set_xticks(range(len(found)), found)
    axis.set_ylim(0.94, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    drawing.tidy(axis, f"{activation}: at its best rate, a dot per seed")
    for number, seeds in enumerate(found.values()):
        if max(highest := [seed["accuracy"] for seed in seeds]) < 0.94:
            words = f"{max(highest):.0%} at most"
            axis.annotate(words, (number, 0.941), ha="center", color="#555")


if __name__ == "__main__":
    sys.exit(main())
