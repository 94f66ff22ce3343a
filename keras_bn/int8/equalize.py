r"""Cross-layer equalization: neighbouring layers whose channels have equal ranges.

A ReLU is homogeneous: `relu(s x) = s relu(x)` for `s > 0`. So the output channels of a
linear layer may be divided by $s_i$, if the layer after the ReLU multiplies them by
$s_i$. With $r_1$ and $r_2$ the largest weights of channel $i$ in both layers,
$s_i = \sqrt{r_{1i} / r_{2i}}$ makes both ranges $\sqrt{r_{1i} r_{2i}}$.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", 2019, section 4.1.
"""

import keras
import numpy as np
from keras import layers

from keras_bn.int8 import weights
from keras_bn.surgery.graph import walk
from keras_bn.surgery.uses import Uses
from keras_bn.tools.linear import Affine, Linear, UnfoldableError, linear

_SWEEPS = 50
_CLOSE = 1e-3

# Layers that do the same to each channel, and whose output scales with their input.
_HOMOGENEOUS = (
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Dropout,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.Identity,
    layers.LeakyReLU,
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
)
_WEIGHTED = (
    layers.Dense,
    layers.Conv1D,
    layers.Conv2D,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
)


def equalize(model):
    """Equalize the ranges of the channels of neighbouring layers, in place.

    Args:
        model: a Functional or Sequential model without batch normalization between the
            layers, as from `fold`. It computes the same afterwards.

    Returns:
        `(pairs, scales)`: a list of pairs of paths, and by the path of a layer what
        its input channels were divided by.
    """
    paths = {id(layer): path for path, layer in walk(model)}
    found = _pairs(model)
    edits: dict[int, Linear] = {}
    scales: dict[int, np.ndarray] = {}
    for first, second in found:
        for node in first, second:
            rank = len(node.input_tensors[0].shape)
            edits.setdefault(id(node.operation), linear(node.operation, rank))
    for _ in range(_SWEEPS):
        steps = [_step(edits, scales, first, second) for first, second in found]
        if max(steps, default=0.0) < _CLOSE:
            break
    for edit in edits.values():
        edit.write(edit.layer)
    pairs = [
        (paths[id(first.operation)], paths[id(second.operation)])
        for first, second in found
    ]
    return pairs, {paths[key]: scale for key, scale in scales.items()}


def _step(edits, scales, first, second):
    """Equalize one pair; returns how far the scales are from 1, as a logarithm."""
    before, after = edits[id(first.operation)], edits[id(second.operation)]
    out = weights.output_range(before.layer, before.arrays)
    into = weights.input_range(after.layer, after.arrays)
    alive = (out > 0) & (into > 0)
    ratio = np.divide(out, into, out=np.ones_like(out), where=alive)
    scale = np.sqrt(ratio)
    none = np.zeros_like(scale)
    before.fold_output(Affine(1 / scale, none), _channels(first.outputs[0], before))
    after.fold_input(Affine(scale, none), _channels(second.input_tensors[0], after))
    key = id(second.operation)
    scales[key] = scales.get(key, 1.0) * scale
    return float(np.abs(np.log(scale)).max())


def _channels(tensor, edit):
    first = getattr(edit.layer, "data_format", None) == "channels_first"
    return (1 if first else len(tensor.shape) - 1,)


def _pairs(model):
    """Pairs of calls of linear layers between which the channels may be scaled."""
    uses = Uses(model)
    return [
        (node, second)
        for node in uses.nodes
        if _is_weighted(node.operation, uses) and _homogeneous(node.operation)
        for second in [_next_weighted(node, uses)]
        if second is not None and _takes(node, second)
    ]


def _is_weighted(operation, uses):
    return type(operation) in _WEIGHTED and uses.once(operation)


def _homogeneous(layer):
    """Whether what a linear layer computes after its sum is homogeneous."""
    activation = getattr(layer, "activation", None)
    return (
        activation is None
        or activation is keras.activations.linear
        or weights.is_relu(activation) == np.inf
    )


def _next_weighted(node, uses):
    """The linear layer that alone takes the output of a call, with ReLUs between."""
    node = uses.next(node)
    while node is not None and not _is_weighted(node.operation, uses):
        operation = node.operation
        relu = weights.is_relu(operation) == np.inf
        if not (relu or type(operation) in _HOMOGENEOUS) or len(node.input_tensors) > 1:
            return None
        node = uses.next(node)
    return node


def _takes(first, second):
    """Whether both layers have the same channels, as many and on the same axis."""
    formats = {
        getattr(node.operation, "data_format", "channels_last")
        for node in (first, second)
    }
    if len(formats) > 1:
        return False
    before, after = (
        linear(node.operation, len(node.input_tensors[0].shape))
        for node in (first, second)
    )
    out = weights.output_range(before.layer, before.arrays)
    into = weights.input_range(after.layer, after.arrays)
    if out.shape != into.shape:
        return False
    none = np.zeros_like(into)
    try:
        after.fold_input(
            Affine(none + 1, none), _channels(second.input_tensors[0], after)
        )
    except UnfoldableError:
        return False
    return True
