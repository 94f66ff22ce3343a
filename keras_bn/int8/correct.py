r"""Bias correction: take out the mean error that rounding the weights causes.

A rounded kernel $\tilde W = W + \varepsilon$ shifts the mean of the output by
$\varepsilon\,\mathrm{E}[x]$. The batch normalization before the layer says what
$\mathrm{E}[x]$ is: its output has the mean $\beta$ and the standard deviation
$|\gamma|$, and a ReLU after it cuts a normal distribution.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", 2019, section 4.2 and appendix C.
"""

import math
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

from keras_bn.int8 import weights
from keras_bn.surgery.arrays import axes, float64
from keras_bn.surgery.norms import is_normalization
from keras_bn.tools.linear import has_input_channels, linear


class Normal(NamedTuple):
    """The mean and the standard deviation of each channel of a tensor."""

    mean: np.ndarray
    stddev: np.ndarray


def cut(normal, high=math.inf):
    """The moments of a normal distribution after a ReLU.

    Args:
        normal: a `Normal`.
        high: the upper bound of the ReLU.

    Returns:
        A `Normal`, of what is no longer one.

    >>> mean, stddev = cut(Normal(np.array([0.0]), np.array([1.0])))
    >>> print(np.round(mean, 4), np.round(stddev**2, 4))  # 1/√(2π), 1/2 − 1/(2π)
    [0.3989] [0.3408]
    """
    mean, stddev = normal.mean, np.maximum(normal.stddev, 1e-12)
    low, up = (0.0 - mean) / stddev, (high - mean) / stddev
    inside = _below(up) - _below(low)
    slope = _density(low) - _density(up)
    first = mean * inside + stddev * slope
    second = (mean**2 + stddev**2) * inside + 2 * mean * stddev * slope
    second = second + stddev**2 * (low * _density(low))
    if math.isfinite(high):
        above = 1 - _below(up)
        first = first + high * above
        second = second + high**2 * above - stddev**2 * (up * _density(up))
    return Normal(first, np.sqrt(np.maximum(second - first**2, 0.0)))


def _density(x):
    return np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)


def _below(x):
    return np.vectorize(lambda v: (1 + math.erf(v / math.sqrt(2))) / 2)(x)


def correct(reference, of, view, plan, scales):
    """Correct the biases of the linear layers of a copy of a folded model, in place.

    Args:
        reference: the `ModelView` of the folded model.
        of: gives the copy of each of its layers.
        view: the `ModelView` of the model before it was folded.
        plan: its `FoldPlan`.
        scales: what `equalize` divided input channels by, by path.

    Returns:
        The paths of the layers that were corrected.
    """
    means = expected_inputs(view, plan)
    corrected = []
    for path, layer in reference.layers:
        if path not in means or not _supported(layer):
            continue
        edit = linear(of(layer), len(layer.input.shape))
        mean = means[path] / scales.get(path, 1.0)
        exact = edit.response(edit.arrays, mean)
        kernels = {n: weights.rounded(edit, n, edit.arrays[n]) for n in edit.names}
        edit.arrays["bias"] = edit.arrays["bias"] - edit.response(kernels, mean) + exact
        edit.write(edit.layer)
        corrected.append(path)
    return corrected


def expected_inputs(view, plan):
    """The mean of each input channel, by the path of a linear layer.

    Args:
        view: the `ModelView` of a model with its batch normalizations.
        plan: its `FoldPlan`. A normalization that is folded into a layer after it is in
            the weights of this, and so not in its input.
    """
    moments: dict[int, Normal | None] = {}
    means: dict[str, np.ndarray] = {}
    for node in view.calls:
        path = view.path(node.operation)
        inputs = [moments.get(id(tensor)) for tensor in node.input_tensors]
        if path and inputs[0] is not None and _supported(node.operation):
            means[path] = inputs[0].mean
        forward = path in plan.forward
        moments[id(node.outputs[0])] = inputs[0] if forward else _after(node, inputs)
    return means


def _after(node, inputs):
    """The moments of the output of a call; None where they are not known."""
    operation = node.operation
    if is_normalization(operation):
        rank = len(node.outputs[0].shape)
        last = [axis % rank for axis in axes(operation)] == [rank - 1]
        return _of_normalization(operation) if last else None
    if any(normal is None for normal in inputs):
        return None
    if isinstance(operation, layers.Add) or type(operation).__name__ == "Add":
        if len(inputs) != len(keras.tree.flatten(node.arguments.args)):
            return None  # it adds numbers too
        means, stddevs = zip(*inputs, strict=True)
        return Normal(sum(means), np.sqrt(sum(np.square(s) for s in stddevs)))
    high = weights.relu_limit(operation)
    if high is not None:
        return cut(inputs[0], high)
    if isinstance(operation, layers.Dropout | layers.ZeroPadding2D | layers.Identity):
        return inputs[0]
    averaging = layers.GlobalAveragePooling2D | layers.AveragePooling2D
    if isinstance(operation, averaging) and not operation.data_format.endswith("first"):
        # The mean stays; the deviation does not, but nothing after it cuts.
        return Normal(inputs[0].mean, np.zeros_like(inputs[0].stddev))
    return None


def _of_normalization(layer):
    channels = layer.moving_mean.shape[0]
    beta = np.zeros(channels) if layer.beta is None else float64(layer.beta)
    gamma = np.ones(channels) if layer.gamma is None else float64(layer.gamma)
    return Normal(beta, np.abs(gamma))


def _supported(layer):
    first = getattr(layer, "data_format", None) == "channels_first"
    return has_input_channels(layer) and not first
