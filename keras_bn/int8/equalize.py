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

from keras_bn.tools.commute import PER_CHANNEL
from keras_bn.tools.linear import Affine, has_input_channels, is_activated, linear

_SWEEPS = 50
_CLOSE = 1e-3


def relu_limit(operation):
    """The upper bound of a ReLU, infinity if it has none; None for anything else."""
    if isinstance(operation, layers.ReLU):
        if operation.negative_slope or operation.threshold:
            return None
        return np.inf if operation.max_value is None else float(operation.max_value)
    alone = isinstance(operation, layers.Activation)
    function = operation.activation if alone else operation
    if function is keras.activations.relu or type(function).__name__ == "Relu":
        return np.inf
    six = function is keras.activations.relu6 or type(function).__name__ == "Relu6"
    return 6.0 if six else None


def equalize(view):
    """Equalize the ranges of the channels of neighbouring layers, in place.

    Args:
        view: the `ModelView` of a model without batch normalization between the
            layers, as from `fold`. It computes the same afterwards.

    Returns:
        A list of pairs of paths.
    """
    calls = _pairs(view)
    edits = {id(node.operation): _linear(node) for pair in calls for node in pair}
    for _ in range(_SWEEPS):
        steps = [_step(edits, first, second) for first, second in calls]
        if max(steps, default=0.0) < _CLOSE:
            break
    for edit in edits.values():
        edit.write(edit.layer)
    return [(view.path(f.operation), view.path(s.operation)) for f, s in calls]


def _linear(node):
    return linear(node.operation, len(node.input_tensors[0].shape))


def _step(edits, first, second):
    """Equalize one pair; returns how far the scales are from 1, as a logarithm."""
    before, after = edits[id(first.operation)], edits[id(second.operation)]
    out, into = output_range(before), input_range(after)
    alive = (out > 0) & (into > 0)
    scale = np.sqrt(np.divide(out, into, out=np.ones_like(out), where=alive))
    none = np.zeros_like(scale)
    axes = [(edit.channel_axis(edit.rank),) for edit in (before, after)]
    before.fold_output(Affine(1 / scale, none), axes[0])
    after.fold_input(Affine(scale, none), axes[1])
    return float(np.abs(np.log(scale)).max())


def output_range(edit):
    """The largest weight of each output channel, of shape `(channels,)`."""
    return np.abs(edit.as_matrix(edit.last, edit.arrays[edit.last])[0]).max(0)


def input_range(edit):
    """The largest weight of each input channel, of shape `(channels,)`."""
    kernel = np.abs(edit.arrays[edit.names[0]])
    if len(edit.channel_axes(edit.names[0])) == 2:  # depthwise
        return kernel.max(tuple(i for i in range(kernel.ndim) if i != kernel.ndim - 2))
    groups = getattr(edit.layer, "groups", 1)
    *_, per_group, filters = kernel.shape
    kernel = kernel.reshape(-1, per_group, groups, filters // groups)
    return kernel.max((0, 3)).T.reshape(-1)


def _pairs(view):
    """Pairs of calls of linear layers between which the channels may be scaled."""
    return [
        (node, second)
        for node in view.calls
        if _is_weighted(layer := node.operation, view)
        and (not is_activated(layer) or relu_limit(layer.activation) == np.inf)
        for second in [_next_weighted(node, view)]
        if second is not None and _takes(node, second)
    ]


def _is_weighted(operation, view):
    return has_input_channels(operation) and view.called_once(operation)


def _next_weighted(node, view):
    """The linear layer that alone takes the output of a call, with ReLUs between."""
    node = view.next(node)
    while node is not None and not _is_weighted(node.operation, view):
        passes = type(node.operation) in PER_CHANNEL | {layers.LeakyReLU}
        passes = passes or relu_limit(node.operation) == np.inf
        if not passes or len(node.input_tensors) > 1:
            return None
        node = view.next(node)
    return node


def _takes(*pair):
    """Whether both layers have the same channels, as many and on the same axis."""
    formats = {getattr(n.operation, "data_format", "channels_last") for n in pair}
    first, second = map(_linear, pair)
    out, into = output_range(first), input_range(second)
    return len(formats) == 1 and out.shape == into.shape
