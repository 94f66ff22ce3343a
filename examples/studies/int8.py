"""Integers classify as well as floats: folded, equalized, or trained for it.

A small depthwise network learns the digits. `keras_bn.export_int8` makes files of
integers of it, which the interpreter runs: as it is; with the channels scaled apart
between the layers, which changes nothing in floats; and with these equalized. Then
`keras_bn.quantize_aware` trains it for twenty more epochs.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018; Krishnamoorthi, "Quantizing deep convolutional
networks for efficient inference: A whitepaper", 2018; Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", 2019.
"""

from common import claims, data, drawing, gallery  # isort: skip

import itertools
import sys

import keras
import numpy as np
from keras import layers

import keras_bn
from keras_bn.int8.export import integer_file
from keras_bn.int8.tflite import Interpreter
from keras_bn.tools.linear import linear

CLAIM = (
    "A file of integers classifies as well as the network of floats: within 1 % after "
    "equalization, where channels that were scaled apart lost more; and within 0.5 % "
    "after training for it."
)
FLOAT = "float"
WAYS = {
    FLOAT: "float",
    "int8": "int8",
    "apart": "int8,\nchannels\nscaled apart",
    "equalized": "scaled apart,\nthen\nequalized",
    "aware": "int8,\ntrained\nfor it",
}
# How far apart channels are scaled: up to e to this power, both ways.
APART = 4.0


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("int8", __doc__, seeds=5, short_seeds=1, argv=argv)
    digits = data.small_digits()
    epochs, shown = (4, 100) if example.short else (30, None)
    figures = []
    for seed in example.each(example.seeds):
        keras.utils.set_random_seed(seed)
        model = network()
        fit(model, digits, epochs, 1e-2)
        fit(model, digits, max(epochs // 3, 1), 1e-3)
        figures.append({"seed": seed, **measure(model, digits, seed, shown)})
    example.table(
        "Accuracy on the other digits, median",
        ["", "accuracy", "less than float"],
        [
            [
                " ".join(words.split()),
                f"{np.median(accuracies(figures, way)):.1%}",
                f"{np.median(losses(figures, way)):+.2%}",
            ]
            for way, words in WAYS.items()
        ],
    )
    return example.conclude(CLAIM, parts_of(figures), figures, draw(figures))


def network():
    """Depthwise separable blocks; ReLU without a bound, so that channels scale."""
    image = keras.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="first")(image)
    x = block_end(x)
    for i, (filters, stride) in enumerate(((24, 2), (32, 1))):
        name = f"depthwise_{i}"
        x = layers.DepthwiseConv2D(
            3, stride, padding="same", use_bias=False, name=name
        )(x)
        x = block_end(x)
        x = layers.Conv2D(filters, 1, use_bias=False, name=f"pointwise_{i}")(x)
        x = block_end(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(10, name="head")(x))


def block_end(x):
    return layers.ReLU()(keras_bn.BatchNormalization(momentum=0.9)(x))


def fit(model, digits, epochs, rate, callbacks=()):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(
        digits.x_train, digits.y_train, 32, epochs, verbose=0, callbacks=list(callbacks)
    )


def measure(model, digits, seed, shown):
    """The accuracy in each way."""
    sample = digits.x_train[:200]
    x, y = digits.x_val[:shown], digits.y_val[:shown]
    steps = -(-len(digits.x_train) // 32)
    tuning = 20 if shown is None else 2

    def of_file(model, given=sample, **options):
        return accuracy_of(integer_file(model, given, **options)[0], x, y)

    found = {FLOAT: of_floats(model, x, y), "int8": of_file(model)}
    apart = scaled_apart(keras_bn.fold(model), seed)
    found["apart in floats"] = of_floats(apart, x, y)
    found["apart"] = of_file(apart)
    found["equalized"] = of_file(apart, equalize=True)
    aware = keras_bn.quantize_aware(model, sample)
    fit(aware, digits, tuning, 1e-3, [keras_bn.FreezeAfter(steps * tuning // 2)])
    found["aware"] = of_file(aware)
    return found


def of_floats(model, x, y):
    return float(np.mean(model.predict(x, verbose=0).argmax(-1) == y))


def accuracy_of(content, x, y):
    """The accuracy of a file, run by the interpreter, one image after the other."""
    interpreter = Interpreter(content)
    (given,), (index,) = interpreter.inputs(), interpreter.outputs().values()
    right = 0
    for image, label in zip(x, y, strict=True):
        interpreter.run({given: image[None]})
        right += interpreter.value(index).argmax() == label
    return float(right / len(x))


def scaled_apart(model, seed):
    """A folded network whose channels are scaled apart, and back in the next layer.

    The outputs of floats stay as they are, since a ReLU keeps positive scales.
    """
    rng = np.random.default_rng(seed)
    layers = [layer for layer in model.layers if hasattr(layer, "kernel")]
    for layer, following in itertools.pairwise(layers):
        channels = layer.bias.shape[0]
        factor = np.exp(rng.uniform(-APART, APART, channels)).astype("float32")
        layer.kernel.assign(linear(layer).scaled(layer.kernel.numpy(), factor))
        layer.bias.assign(layer.bias.numpy() * factor)
        # The input channels of every kernel here are on its last axis but one.
        following.kernel.assign(following.kernel.numpy() / factor[:, None])
    return model


def accuracies(figures, way):
    return np.array([one[way] for one in figures])


def losses(figures, way):
    return accuracies(figures, FLOAT) - accuracies(figures, way)


def parts_of(figures):
    def lost(says, way, bound):
        values = losses(figures, way)
        return claims.Part(says, values, form="{:+.4f}", **bound)

    return [
        claims.Part(
            "accuracy in floats", accuracies(figures, FLOAT), above=0.97, form="{:.4f}"
        ),
        lost(
            "accuracy lost where channels are scaled apart",
            "apart",
            {"above": 0.01},
        ),
        lost("accuracy lost once equalized", "equalized", {"below": 0.01}),
        lost("accuracy lost when trained for it", "aware", {"below": 0.005}),
    ]


def draw(figures):
    """Accuracy by way, one dot per seed."""
    figure, axes = drawing.new_figure(
        "Digits by a small depthwise network, in floats and in files of integers:\n"
        "what is lost, and what brings it back?  One dot per seed, bars at medians",
        [["accuracy"]],
        size=(10, 5.5),
    )
    axis = axes["accuracy"]
    better = {"equalized", "aware"}
    for at, way in enumerate(WAYS):
        color = drawing.WITH if way in better else drawing.WITHOUT
        color = drawing.COLORS[5] if way == FLOAT else color
        values = accuracies(figures, way)
        drawing.dots(axis, at, values, color)
        median = np.median(values)
        axis.text(at + 0.28, median, f"{median:.1%}", va="center", color=color)
    axis.set_xticks(range(len(WAYS)), WAYS.values())
    axis.set_xlim(-0.4, len(WAYS) - 0.1)
    drawing.tidy(axis, ylabel="accuracy on other digits")
    drawing.percent(axis)
    return figure


if __name__ == "__main__":
    sys.exit(main())
