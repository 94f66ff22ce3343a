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
from keras_bn.surgery.graph import walk
from keras_bn.surgery.norms import is_normalization
from keras_bn.surgery.uses import Uses
from keras_bn.tools.linear import (
    Affine,
    linear,
    scale_convolution_input,
    scale_depthwise_input,
)


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


def correct(model, original, folds, scales=None):
    """Correct the biases of the linear layers of a folded model, in place.

    Args:
        model: the folded model.
        original: the model before it was folded.
        folds: its plan, a list of `Fold`.
        scales: what `equalize` divided input channels by, by path.

    Returns:
        The paths of the layers that were corrected.
    """
    found = expected_inputs(original, folds)
    scales, corrected = scales or {}, []
    for path, layer in walk(model):
        if path not in found or not _supported(layer):
            continue
        mean = found[path] / scales.get(path, 1.0)
        edit = linear(layer, len(layer.input.shape))
        edit.arrays["bias"] = edit.arrays["bias"] - _shift(layer, edit.arrays, mean)
        edit.write(layer)
        corrected.append(path)
    return corrected


def expected_inputs(model, folds):
    """The mean of each input channel, by the path of a linear layer.

    Args:
        model: a Functional or Sequential model with its batch normalizations.
        folds: its plan, a list of `Fold`. A normalization that is folded into the
            layer after it is in the weights of this, and so not in its input.
    """
    paths = {id(layer): path for path, layer in walk(model)}
    into = {each.layer: each.into for each in folds}
    uses = Uses(model)
    known: dict[int, Normal | None] = {}
    found: dict[str, np.ndarray] = {}
    for node in uses.nodes:
        path = paths.get(id(node.operation))
        given = [known.get(id(tensor)) for tensor in node.input_tensors]
        if path is not None and given[0] is not None and _supported(node.operation):
            found[path] = given[0].mean
        consumers = uses.consumers(node.outputs[0])
        after = any(paths.get(id(n.operation)) == into.get(path, "") for n in consumers)
        known[id(node.outputs[0])] = given[0] if after else _after(node, given)
    return found


def _after(node, given):
    """The moments of the output of a call; None where they are not known."""
    operation = node.operation
    if is_normalization(operation):
        rank = len(node.outputs[0].shape)
        last = [axis % rank for axis in axes(operation)] == [rank - 1]
        return _of_normalization(operation) if last else None
    if any(each is None for each in given):
        return None
    if isinstance(operation, layers.Add) or type(operation).__name__ == "Add":
        if len(given) != len(operation_inputs(node)):
            return None
        means, stddevs = zip(*given, strict=True)
        return Normal(sum(means), np.sqrt(sum(np.square(s) for s in stddevs)))
    high = weights.is_relu(operation)
    if high is not None:
        return cut(given[0], high)
    if isinstance(operation, layers.Dropout | layers.ZeroPadding2D | layers.Identity):
        return given[0]
    averaging = layers.GlobalAveragePooling2D | layers.AveragePooling2D
    if isinstance(operation, averaging) and not operation.data_format.endswith("first"):
        # The mean stays; the deviation does not, but nothing after it cuts.
        return Normal(given[0].mean, np.zeros_like(given[0].stddev))
    return None


def operation_inputs(node):
    """The tensors and numbers that a call adds up."""
    return keras.tree.flatten(node.arguments.args)


def _of_normalization(layer):
    channels = layer.moving_mean.shape[0]
    beta = np.zeros(channels) if layer.beta is None else float64(layer.beta)
    gamma = np.ones(channels) if layer.gamma is None else float64(layer.gamma)
    return Normal(beta, np.abs(gamma))


_SUPPORTED = (
    layers.Dense,
    layers.Conv1D,
    layers.Conv2D,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
)


def _supported(layer):
    first = getattr(layer, "data_format", None) == "channels_first"
    return type(layer) in _SUPPORTED and not first


def _shift(layer, arrays, mean):
    """What rounding the weights adds to the mean of each output channel."""
    names = weights.names(layer)
    error = {
        name: weights.rounded(layer, name, arrays[name]) - arrays[name]
        for name in names
    }
    if len(names) == 2:
        depthwise, pointwise = names
        through = arrays[pointwise].reshape(-1, arrays[pointwise].shape[-1])
        wrong = error[pointwise].reshape(through.shape)
        between = _depthwise_mean(arrays[depthwise], mean)
        return _depthwise_mean(error[depthwise], mean) @ through + between @ wrong
    if isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D):
        return _depthwise_mean(error["kernel"], mean)
    affine = Affine(np.ones_like(mean), mean)
    return scale_convolution_input(
        error["kernel"], 0.0, affine, getattr(layer, "groups", 1)
    )[1]


def _depthwise_mean(kernel, mean):
    return scale_depthwise_input(kernel, Affine(np.ones_like(mean), mean))[1]
