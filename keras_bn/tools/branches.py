r"""Sums of linear layers that read the same tensor, as one of these layers.

Each is a convolution: its output at $o$ is $b + \sum_t K_t\, x_{so + dt + f}$ over the
places $t$ of its kernel, with strides $s$, dilation $d$, and a first place $f$ that
padding moves; $x$ is zero outside of its borders. `Dense`, a batch normalization and
the tensor itself have one place. Kernels add where their places are the same.

Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", 2021.
"""

from typing import NamedTuple

import numpy as np
from keras import layers

from keras_bn.tools.commute import changes_nothing
from keras_bn.tools.linear import Linear, Normalization, UnfoldableError


class Branch(NamedTuple):
    """A part of a sum.

    Args:
        name: for messages.
        edit: the `Linear` of its layer; None for the tensor itself.
        shape: of what its layer reads.
        zeros: how many stand before and behind the tensor there, along each axis: an
            array of shape `(rank, 2)`.
        sign: -1 if the sum subtracts it, else 1.
        way: the sums that it is a part of, the outermost first: a list of the call of
            a sum and the tensor that it takes.
    """

    name: str
    edit: Linear | None
    shape: tuple
    zeros: np.ndarray
    sign: int
    way: list


_PADDING = layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D


def zeros_around(node):
    """How many zeros a call puts around its input, and nothing else; None for others.

    Returns:
        An array as in `Branch`.
    """
    layer = node.operation
    zeros = np.zeros((len(node.outputs[0].shape), 2), int)
    if type(layer) in _PADDING:
        own = zeros[2:] if layer.data_format == "channels_first" else zeros[1:-1]
        own[:] = np.reshape(layer.padding, (-1, 2))
    elif not changes_nothing(node):
        return None
    return zeros


class _Places(NamedTuple):
    """A branch as a convolution: arrays of one value per axis, but the first three."""

    kernel: np.ndarray
    bias: np.ndarray
    groups: int
    strides: np.ndarray
    dilation: np.ndarray
    first: np.ndarray
    shrinks: np.ndarray  # by how much without strides; 0 where sizes are known


def merge(branches):
    """Let the layer of one branch compute the sum of all.

    Args:
        branches: a list of `Branch` of one tensor, whose outputs have one shape.

    Returns:
        `(branch, kernel, bias)`: the branch, and what its `Linear` is to `take`.

    Raises:
        UnfoldableError: if no layer can.
    """
    kernels = [b for b in branches if b.edit and not isinstance(b.edit, Normalization)]
    if not kernels:
        raise UnfoldableError("no part has a kernel")
    kernels.sort(key=lambda branch: -_places(branch, _axis(branch)).kernel.size)
    reasons = []
    for into in kernels:
        try:
            return into, *_added(into, branches)
        except UnfoldableError as reason:
            reasons.append(reason)
    raise reasons[0]


class Placement(NamedTuple):
    """How the kernel of a branch goes into that of another, as tensors.

    It is `pad(reshape(kernel, shape) * factor, widths)`.

    Args:
        sign: as of `Branch`.
        shape: with an axis for each place of the other kernel. The kernel of a
            normalization is its scale, and the tensor itself has one of ones.
        factor: of ones and zeros for these, else 1.
        widths: how many zeros to put around it.
    """

    sign: int
    shape: tuple
    factor: np.ndarray | int
    widths: list


def placements(into, branches):
    """The `Placement` of each branch in the one that `merge` gives.

    Raises:
        UnfoldableError: if more than zeros has to be put in.
    """
    mine, found = _places(into, _axis(into)), []
    for branch in branches:
        other, name = _places(branch, _axis(into)), f"'{branch.name}'"
        where = [w.ravel() for w in _where(other, mine, name, f"'{into.name}'")]
        shape, factor, groups = other.kernel.shape, 1, other.groups
        if branch.edit is None or isinstance(branch.edit, Normalization):
            factor = _in_groups(np.ones(shape), groups, mine.groups)
            shape, groups = (-1,), mine.groups
        if groups != mine.groups or any((np.diff(w) > 1).any() for w in where):
            raise UnfoldableError(f"{name} has other groups, or places apart")
        sizes = zip(where, mine.kernel.shape, strict=False)
        widths = [(int(w[0]), size - 1 - int(w[-1])) for w, size in sizes]
        found.append(Placement(branch.sign, shape, factor, [*widths, (0, 0), (0, 0)]))
    return found


def _axis(branch):
    return branch.edit.channel_axis(len(branch.shape))


def _added(into, branches):
    """The kernel and the bias of all branches, with the places of one."""
    mine = _places(into, _axis(into))
    kernel, bias = np.zeros_like(mine.kernel), np.zeros(mine.kernel.shape[-1])
    for branch in branches:
        other = _places(branch, _axis(into))
        where = _where(other, mine, f"'{branch.name}'", f"'{into.name}'")
        added = _in_groups(other.kernel, other.groups, mine.groups)
        kernel[where] += branch.sign * added
        bias = bias + branch.sign * other.bias
    return kernel, bias


def _places(branch, axis):
    """A branch as `_Places`, with channels on an axis."""
    edit, shape, name = branch.edit, branch.shape, f"'{branch.name}'"
    inner = [i for i in range(1, len(shape)) if i != axis]
    if edit is None:
        kernel, bias, groups = np.ones((1, shape[axis])), np.zeros(()), shape[axis]
    else:
        try:
            kernel, bias, groups = edit.as_convolution(axis)
        except UnfoldableError as reason:
            raise UnfoldableError(f"{name} {reason}") from None
    if branch.zeros[axis].any():
        raise UnfoldableError(f"zeros stand beside the channels before {name}")
    kernel = kernel.reshape([1] * (len(shape) - kernel.ndim) + list(kernel.shape))
    layer = getattr(edit, "layer", None)
    one = np.ones(len(inner), int)
    strides = one * getattr(layer, "strides", 1)
    dilation = one * getattr(layer, "dilation_rate", 1)
    reach = dilation * (np.array(kernel.shape[:-2], int) - 1) + 1
    zeros = branch.zeros[inner]
    padding = getattr(layer, "padding", "valid")
    known = np.array([shape[i] is not None for i in inner], bool)
    sizes = np.array([shape[i] or 0 for i in inner], int)
    if padding == "causal":
        zeros = zeros + np.stack([reach - 1, 0 * reach], 1)
    elif padding == "same":
        if (~known & (strides > 1) & (reach > 1)).any():
            raise UnfoldableError(f"the padding of {name} depends on sizes not known")
        # Without strides, the zeros do not depend on the size.
        more = np.maximum((-(-sizes // strides) - 1) * strides + reach - sizes, 0)
        zeros = zeros + np.stack([more // 2, more - more // 2], 1)
    shrinks = np.where(known, 0, reach - zeros.sum(1))
    return _Places(kernel, bias, groups, strides, dilation, -zeros[:, 0], shrinks)


def _where(other, mine, name, into):
    """The indices of the places of one branch in the kernel of another."""
    if (other.strides != mine.strides).any():
        raise UnfoldableError(f"{name} has other strides than {into}")
    if (other.shrinks != mine.shrinks).any():
        raise UnfoldableError(f"{name} and {into} have outputs of sizes not known")
    if other.groups % mine.groups:
        raise UnfoldableError(f"{name} has other groups than {into}")
    indices = []
    for axis, size in enumerate(mine.kernel.shape[:-2]):
        places = other.first[axis] - mine.first[axis]
        places = places + other.dilation[axis] * np.arange(other.kernel.shape[axis])
        index, between = np.divmod(places, mine.dilation[axis])
        if between.any() or index.min() < 0 or index.max() >= size:
            raise UnfoldableError(f"{name} reads places that {into} does not")
        indices.append(index)
    return np.ix_(*indices)


def _in_groups(kernel, groups, fewer):
    """A kernel with fewer and wider groups, and zeros in them."""
    if groups == fewer:
        return kernel
    *places, channels, filters = kernel.shape
    inside, filters = groups // fewer, filters // groups
    kernel = kernel.reshape(*places, channels, fewer, inside, filters)
    wide = np.zeros((*places, inside, channels, fewer, inside, filters))
    for i in range(inside):
        wide[..., i, :, :, i, :] = kernel[..., i, :]
    return wide.reshape(*places, inside * channels, fewer * inside * filters)
