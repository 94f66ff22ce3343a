"""This layer trains a convolutional network faster than Keras's, and folds away after.

A small convolutional network with Keras's batch normalization is built for
scikit-learn's digits and converted with `keras_bn.from_keras`. Both train from the same
weights on the same batches, a step of one and a step of the other in turn. What
`keras_bn.fold` makes of the trained one is compared with it, in answers and in time.
Measured: time per training step, accuracy, the largest difference that folding makes to
a probability, and time per batch of 128 in inference.

Source of the folding: Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", 2018, section 3.2.
"""

from common import claims, data, drawing, gallery  # isort: skip

import sys
import time

import keras
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

import keras_bn

CLAIM = (
    "A network converted with from_keras trains in less time to the same accuracy, and "
    "folded it gives the same answers in less time still."
)
BATCH = 128
COLORS = {"Keras": drawing.WITHOUT, "keras_bn": drawing.WITH}


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("convolution", __doc__, seeds=5, argv=argv, short_seeds=1)
    epochs = 2 if example.short else 10
    digits = data.small_digits()
    figures = [measured(digits, seed, epochs) for seed in example.each(example.seeds)]

    def median(key, name):
        return np.median([seed[key][name] for seed in figures])

    rows = [
        (
            name,
            f"{median('step_ms', name):.1f}",
            f"{median('accuracy', name):.1%}",
            f"{median('inference_ms', name):.1f}" if name != "Keras" else "",
        )
        for name in COLORS
    ]
    rows.append(("folded", "", "", f"{median('inference_ms', 'folded'):.1f}"))
    header = ["", "ms per training step", "accuracy", "ms per batch, inference"]
    example.table("Medians over the seeds", header, rows)
    return example.conclude(CLAIM, parts(figures), figures, draw(figures))


def build():
    """The network, with Keras's layer."""
    layers = [keras.Input((8, 8, 1))]
    for filters in (32, 32, 64):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
    layers += [
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(10, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def measured(digits, seed, epochs):
    """The figures of one seed."""
    keras.utils.set_random_seed(seed)
    models = {"Keras": build()}
    models["keras_bn"] = keras_bn.from_keras(models["Keras"])
    steps = {name: [] for name in models}
    accuracies = {name: [] for name in models}
    draw = np.random.default_rng(seed)
    for _ in range(epochs):
        order = draw.permutation(len(digits.x_train))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            batch = digits.x_train[rows], digits.y_train[rows]
            for name, model in models.items():
                steps[name].append(seconds(model.train_on_batch, *batch))
        for name, model in models.items():
            accuracies[name].append(accuracy(model, digits))
    trained = models["keras_bn"]
    folded = keras_bn.fold(trained)
    apart = np.abs(trained(digits.x_val) - folded(digits.x_val)).max()
    shipped = {"keras_bn": trained, "folded": folded}
    batch = digits.x_val[:BATCH]
    times = {name: [] for name in shipped}
    for _ in range(100):
        for name, model in shipped.items():
            times[name].append(seconds(model.predict_on_batch, batch))
    return {
        "seed": seed,
        # The first steps trace and warm up.
        "step_ms": {name: 1000 * np.median(x[3:]) for name, x in steps.items()},
        "inference_ms": {name: 1000 * np.median(x[3:]) for name, x in times.items()},
        "accuracies": accuracies,
        "accuracy": {name: x[-1] for name, x in accuracies.items()},
        "folding_changes": apart,
        "answers_changed": int(
            np.sum(answers(trained, digits.x_val) != answers(folded, digits.x_val))
        ),
    }


def answers(model, images):
    return model.predict_on_batch(images).argmax(axis=-1)


def accuracy(model, digits):
    return np.mean(answers(model, digits.x_val) == digits.y_val)


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def parts(figures):
    """The parts of the claim."""

    def compared(key, name, other, compare):
        return [compare(seed[key][name], seed[key][other]) for seed in figures]

    apart = compared("accuracy", "keras_bn", "Keras", np.subtract)
    return [
        claims.Part(
            "time per training step, keras_bn / Keras",
            compared("step_ms", "keras_bn", "Keras", np.divide),
            below=1,
        ),
        claims.Part(
            "accuracy, difference in size", np.abs(apart), below=0.01, form="{:.2%}"
        ),
        claims.Part(
            "largest change of a probability by folding",
            [seed["folding_changes"] for seed in figures],
            below=1e-5,
            form="{:.0e}",
        ),
        claims.Part(
            "time per batch, folded / not folded",
            compared("inference_ms", "folded", "keras_bn", np.divide),
            below=1,
        ),
    ]


def draw(figures):
    """The picture: the same accuracy, and the times."""
    step, same, folding, inference = (part.values for part in parts(figures))
    figure, axes = drawing.new_figure(
        f"Converted by from_keras, a training step takes {np.median(step):.0%} of "
        f"Keras's time, and accuracy differs by {np.median(same):.1%};\nfolded, "
        f"inference takes {np.median(inference):.0%} of the time, and probabilities "
        f"change by up to {max(folding):.0e} (medians of {len(figures)} seeds)",
        [["accuracy", "accuracy", "step_ms", "inference_ms"]],
        size=(13, 4.6),
    )
    _accuracy(axes["accuracy"], figures)
    _times(axes["step_ms"], figures, "step_ms", COLORS)
    drawing.tidy(axes["step_ms"], "Milliseconds per training step")
    colors = {"keras_bn": drawing.WITH, "folded": drawing.COLORS[3]}
    _times(axes["inference_ms"], figures, "inference_ms", colors)
    drawing.tidy(axes["inference_ms"], f"Milliseconds per batch of {BATCH}, inference")
    return figure


def _accuracy(axis, figures):
    for name, color, width in (("Keras", COLORS["Keras"], 7), ("keras_bn", "black", 1)):
        curves = np.array([seed["accuracies"][name] for seed in figures])
        epochs = np.arange(1, curves.shape[1] + 1)
        axis.plot(
            epochs, curves.T, "o-", color=color, lw=width, ms=2 + width, alpha=0.5
        )
        axis.plot([], "o-", color=color, lw=width, ms=2 + width, label=name)
    axis.set_ylim(top=1)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, loc="lower right")
    drawing.tidy(axis, "Validation accuracy, a line per seed", "epoch")


def _times(axis, figures, key, colors):
    for number, (name, color) in enumerate(colors.items()):
        drawing.dots(axis, number, [seed[key][name] for seed in figures], color)
    axis.set_xticks(range(len(colors)), colors)
    axis.set_xlim(-0.6, len(colors) - 0.4)
    axis.set_ylim(bottom=0)


if __name__ == "__main__":
    sys.exit(main())
