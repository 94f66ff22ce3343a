r"""Bias correction: take out the mean error that rounding the weights causes.

A rounded kernel $\tilde W = W + \varepsilon$ shifts the mean of the output by the mean
of $\varepsilon x$, which is measured on the samples and taken from the bias.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", 2019, section 4.2, which takes the mean of $x$ from batch normalizations.
"""

import collections
from typing import Any

from keras import ops

from keras_bn.int8 import tflite, weights
from keras_bn.int8.measure import through
from keras_bn.int8.samples import at_once
from keras_bn.surgery.norms import is_normalization
from keras_bn.tools.linear import call_with, linear


def shifts_of(view, samples):
    """What rounding the weights adds to the mean of each output channel.

    Args:
        view: the `ModelView` of a model.
        samples: list of batches, each a list of arrays, one for each input.

    Returns:
        A dict of arrays by the path of the layer: of each linear one with a bias.
    """
    paths, rounded = {}, {}
    for path, layer in view.layers:
        if (edit := _edit(layer)) is not None:
            paths[id(layer)], rounded[path] = path, _rounded(edit)

    def means(*inputs):
        traced, found = through(view.model, list(inputs)), collections.defaultdict(list)
        for number, call in traced.calls.items():
            if path := paths.get(id(call.operation)):
                x = traced.inputs[number]
                found[path].append(_shift(call.operation, rounded[path], x))
        return {path: sum(values) / len(values) for path, values in found.items()}

    compiled = tflite.graph(means)
    sums: dict[str, Any] = collections.defaultdict(float)
    total = 0
    for _, together in at_once(samples):
        many = len(together[0])
        for path, mean in compiled(*map(ops.convert_to_tensor, together)).items():
            sums[path] += ops.convert_to_numpy(mean).astype("float64") * many
        total += many
    return {path: value / total for path, value in sums.items()}


def correct(view, shifts, of):
    """Take shifts from the biases of a copy of a model, in place.

    Args:
        view: the `ModelView` of the model.
        shifts: what `shifts_of` gives for it, or a part of that.
        of: the copy of each of its layers.
    """
    for path, layer in view.layers:
        if path in shifts:
            edit = linear(layer, len(layer.input.shape))
            edit.arrays["bias"] = edit.arrays["bias"] - shifts[path]
            edit.write(of(layer))


def _edit(layer):
    """The `Linear` of a layer with a bias for each channel; None of any other."""
    edit = None if is_normalization(layer) else linear(layer)
    return edit if edit is not None and edit.arrays["bias"].ndim == 1 else None


def _rounded(edit):
    return {n: weights.rounded(edit, n, edit.arrays[n]) for n in edit.names}


def _shift(layer, rounded, x):
    """The mean of what rounded weights add to an output, for each channel."""

    def output(kernels):
        kernels = {n: ops.cast(kernel, x.dtype) for n, kernel in kernels.items()}
        return call_with(layer, {**kernels, "activation": None}, x)

    y = output(rounded) - output({name: getattr(layer, name) for name in rounded})
    axis = linear(layer, len(x.shape)).channel_axis(len(y.shape))
    return ops.mean(y, [i for i in range(len(y.shape)) if i != axis])
