r"""Bias correction: take out the mean error that rounding the weights causes.

A rounded kernel $\tilde W = W + \varepsilon$ shifts the mean of the output by the mean
of $\varepsilon x$, which is measured on the samples and taken from the bias.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", 2019, section 4.2, which takes the mean of $x$ from batch normalizations.
"""

import collections

import numpy as np
from keras import ops

from keras_bn.int8 import tflite
from keras_bn.int8.samples import at_once
from keras_bn.surgery.calls import run
from keras_bn.surgery.norms import is_normalization
from keras_bn.tools.linear import call_with, linear


def rounded(linear, name, kernel):
    """A kernel of a `Linear` as int8 keeps it: symmetric, each channel scaled."""
    matrix, back = linear.as_matrix(name, kernel)
    scale = np.abs(matrix).max(0) / 127
    scale = np.where(scale > 0, scale, 1.0)
    return back(np.rint(matrix / scale) * scale)


def shifts_of(view, samples):
    """What rounding the weights adds to the mean of each output channel on samples.

    Returns:
        A dict of arrays by the path of the layer: of each linear one with a bias.
    """
    kernels = {}  # rounded, by the path of the layer
    for path, layer in view.layers:
        edit = None if is_normalization(layer) else linear(layer)
        if edit is not None and edit.arrays["bias"].ndim == 1:  # one for each channel
            arrays = edit.arrays
            kernels[path] = {n: rounded(edit, n, arrays[n]) for n in edit.names}

    def means(inputs):
        found = collections.defaultdict(list)

        def around(call, compute):
            if (path := view.path(call.operation)) in kernels:
                args = compute.args
                x = args[0] if args else compute.keywords["inputs"]
                found[path].append(_shift(call.operation, kernels[path], x))
            with tflite.scope(f"call{call.number}"):  # a layer's name may be no scope
                return compute()

        run(view.model, inputs, around)
        return {path: sum(values) / len(values) for path, values in found.items()}

    means_of, counts, every = tflite.compiled(means), [], []
    for _, together in at_once(samples):
        counts.append(len(together[0]))
        every.append(means_of(together))
    return {p: np.average([m[p] for m in every], 0, counts) for p in every[0]}


def correct(view, shifts, of):
    """Take shifts from the biases of a copy of a model, in place.

    `shifts` is a part of what `shifts_of` gives, and `of` gives the copy of a layer.
    """
    for path, layer in view.layers:
        if path in shifts:
            edit = linear(layer, len(layer.input.shape))
            edit.arrays["bias"] = edit.arrays["bias"] - shifts[path]
            edit.write(of(layer))


def _shift(layer, kernels, x):
    """The mean of what rounded kernels add to an output, for each channel."""

    def output(kernels):
        kernels = {n: ops.cast(kernel, x.dtype) for n, kernel in kernels.items()}
        return call_with(layer, {**kernels, "activation": None}, x)

    y = output(kernels) - output({name: getattr(layer, name) for name in kernels})
    axis = linear(layer, len(x.shape)).channel_axis(len(y.shape))
    return ops.mean(y, [i for i in range(len(y.shape)) if i != axis])
