"""Where the channels of an input are, and how its statistics line up with it."""

import functools
import math
import operator
from collections.abc import Callable, Sequence

from keras import ops

from keras_bn.backends.formulas import where
from keras_bn.moments import Tensor

# How many elements of each channel give the shift, at least: so near is it to the mean.
SHIFT_ROWS = 16

# And at least one of so many, of a batch whose size is known: it is then never further
# from the mean than the root of this in standard deviations.
SHIFT_SHARE = 64


def broadcast(
    value: Tensor, shape: Sequence[int | None], axes: tuple[int, ...]
) -> Tensor:
    """A value per channel, in the shape that broadcasts against an input.

    Args:
        value: tensor with the sizes of the input along `axes`.
        shape: static shape of the input.
        axes: the channel axes, non-negative and ascending.
    """
    first = min(axes)
    if tuple(axes) == tuple(range(first, len(shape))):
        return value
    sizes = [shape[i] if i in axes else 1 for i in range(first, len(shape))]
    return ops.reshape(value, sizes)


def add_offset(x: Tensor, offset: Tensor, axis: int) -> Tensor:
    """`x + offset`, with one value per channel; see the contract of the backends."""
    return x + broadcast(offset, x.shape, (axis,))


def assert_mask_shape(mask: Tensor, x: Tensor, along: Sequence[int]) -> Tensor:
    """The mask, on a backend that knows all sizes and has compared them before."""
    return mask


def dense(
    x: Tensor, mask: Tensor | None, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """The input and its mask, on a backend that has no ragged tensors."""
    return x, mask, lambda y: y


class Layout:
    """How statistics line up with an input: the shapes used inside a kernel.

    Inside a kernel the input is `inner(x)`, and every statistic or parameter has a
    shape that broadcasts against it, so that no formula mentions an axis. With the
    channels last, in one axis or several, statistics keep their shape; otherwise they
    have sizes of 1 in between.

    Args:
        x: the input, with known sizes along `axes`.
        axes: the channel axes, non-negative and ascending.
        xla: whether XLA compiles what is computed.
    """

    def __init__(self, x, axes, xla=False):
        rank = len(x.shape)
        self._axes = axes
        self._xla = xla
        self._channels = [x.shape[axis] for axis in axes]
        self._rows = [axis for axis in range(rank) if axis not in axes]
        last = tuple(axes) == tuple(range(rank - len(axes), rank))
        self._keepdims = not last
        self._inner = self._channels
        if not last:
            self._inner = [x.shape[i] if i in axes else 1 for i in range(rank)]

    def inner(self, x):
        """`x` in the shape the arithmetic runs in."""
        return x

    def outer(self, y, x):
        """`y`, of the inner shape, in the shape of the input `x`."""
        return y

    def parameter(self, value, fill, dtype):
        """A value per channel in the inner shape; `fill` for all if it is None."""
        if value is None:
            return ops.full(self._inner, fill, dtype)
        return _reshaped(ops.cast(value, dtype), self._inner)

    def statistic(self, value):
        """A value per channel, or one for all, from the inner shape to the caller's."""
        one_for_all = math.prod(value.shape) == 1
        if not one_for_all:
            # A mask may leave out the same elements in channels along one of the axes.
            value = ops.broadcast_to(value, self._inner)
        scalar = one_for_all and math.prod(self._channels) > 1
        return _reshaped(value, [] if scalar else self._channels)

    def mask(self, mask, x):
        """The mask with the sizes of the input, 1 along the channels; or None."""
        if mask is None:
            return None
        sizes = [
            1 if axis in self._axes and mask.shape[axis] == 1 else size
            for axis, size in enumerate(ops.shape(x))
        ]
        return ops.broadcast_to(mask, sizes)

    def count(self, x, mask):
        """How many elements stand behind each statistic, in the dtype of `x`."""
        if mask is not None:
            return self.sum(ops.cast(mask, x.dtype))
        sizes = ops.shape(x)
        rows = [sizes[axis] for axis in self._rows]
        known = math.prod(n for n in rows if isinstance(n, int))
        unknown = [n for n in rows if not isinstance(n, int)]
        factors = unknown if known == 1 and unknown else [known, *unknown]
        return ops.cast(functools.reduce(operator.mul, factors), x.dtype)

    def shifted(self, x, mask):
        """The input less a value near the mean of each channel.

        The value is a constant to differentiation: the mean of the first few elements,
        added up in float64, where a sum of equal numbers is exact. With a mask, and
        under XLA, it is an element of the channel plus the mean of what all elements,
        or the first few, are off from it. The two parts stay apart, as XLA may compute
        a sum in several places, and round it in several ways. An element of the input
        is the same everywhere, and what small numbers lose to rounding is small.

        Returns:
            `(near, rest, d)`: the two parts, the second None if there is one alone; and
            the input less both. The mean of `d` leads back to that of the input by
            `near + formulas.beyond(rest, mean)`.
        """
        few = None if mask is not None else self._few(x)
        if few is not None and not self._xla:
            near = ops.cast(self._average(ops.cast(few, "float64")), x.dtype)
            return near, None, x - near
        near = self.near(x, mask)
        if few is None:
            d = x - self.broadcast(near)
            rest = self._mean(ops.stop_gradient(d), mask)
            return near, rest, d - self.broadcast(rest)
        rest = self._average(few - near)
        return near, rest, (x - near) - rest

    def near(self, x, mask):
        """An element of each channel that counts, as a constant; 0 if there is none.

        With a mask it is the largest one. Outside of XLA only the first few samples are
        searched for it: without one, sums lose digits, but are the same everywhere.
        """
        x = ops.stop_gradient(x)
        if mask is not None:
            few = None if self._xla else self._few(x)
            if few is None:
                return self._largest(x, mask)
            return self._largest(few, mask[: self._few_samples(x)])
        rank = range(len(x.shape))
        return self.sum(x[tuple(slice(1 if i in self._rows else None) for i in rank)])

    def _few(self, x):
        """The first samples, as constants; None if they are channels."""
        if 0 in self._axes:
            return None
        return ops.stop_gradient(x[: self._few_samples(x)])

    def _few_samples(self, x):
        # A list: torch.compile does not take a generator there.
        each = math.prod([x.shape[axis] or 1 for axis in self._rows[1:]])
        size, batch = -(-SHIFT_ROWS // max(each, 1)), x.shape[0]
        if isinstance(batch, int):
            size = max(size, batch // SHIFT_SHARE)
        return size

    def _largest(self, x, mask):
        if any(x.shape[axis] == 0 for axis in self._rows):
            return self.parameter(None, 0.0, x.dtype)
        lowest = ops.full_like(x, float("-inf"))
        largest = self.max(x if mask is None else ops.where(mask, x, lowest))
        # Where nothing counts, TensorFlow's `segment_max` gives the lowest number.
        return where(ops.isfinite(2.0 * largest), largest)

    def _average(self, x):
        return ops.mean(x, self._rows, keepdims=self._keepdims)

    def _mean(self, x, mask):
        count = self.count(x, mask)
        # Keras's `maximum` gives float32 for float64 on PyTorch.
        n = ops.where(count > 0, count, ops.ones_like(count))
        return self.sum(where(mask, x)) / n

    def sum(self, x):
        """The sum over everything that belongs to one channel, in the inner shape."""
        return ops.sum(x, self._rows, keepdims=self._keepdims)

    def max(self, x):
        """The largest of everything that belongs to one channel, likewise."""
        # `ops.max` breaks the graph of torch.compile.
        return ops.amax(x, self._rows, keepdims=self._keepdims)

    def broadcast(self, value):
        """A statistic as it broadcasts against the input: as it is."""
        return value

    def total(self, value):
        """The sum of a statistic over the groups of the batch: here there is one."""
        return value


class Images(Layout):
    """The layout of ops for images: four axes, the channels last.

    Args:
        x: the input, with known sizes along `axes`.
        axes: the one channel axis, non-negative.
    """

    def __init__(self, x, axes):
        rank, (axis,) = len(x.shape), axes
        self._rank = rank
        self._last = [i for i in range(rank) if i != axis] + [axis]
        self._moves = axis != rank - 1
        super().__init__(self.inner(x), (3,))

    def inner(self, x):
        if self._moves:
            x = ops.transpose(x, self._last)
        return x if self._rank == 4 else ops.reshape(x, [-1, 1, 1, x.shape[-1]])

    def outer(self, y, x):
        if self._rank != 4:
            sizes = ops.shape(x)
            y = ops.reshape(y, [sizes[i] for i in self._last])
        if self._moves:
            y = ops.transpose(y, [self._last.index(i) for i in range(self._rank)])
        return y


class Grouped(Layout):
    """The layout of a batch cut in order into groups, each with its own statistics.

    A batch of `n` gives `max(1, n // size)` groups of `size`, the last taking the
    remainder. Statistics have the groups along the leading axis of the inner shape,
    where the input has its batch.

    Args:
        x: the input, with known sizes along `axes` and the batch in axis 0.
        axes: the channel axes, non-negative and ascending, without axis 0.
        size: how many samples make a group.
        xla: as for `Layout`.
    """

    def __init__(self, x, axes, size, xla=False):
        super().__init__(x, axes, xla)
        self._inner = [d if i in axes else 1 for i, d in enumerate(x.shape)]
        batch = ops.shape(x)[0]
        known = isinstance(batch, int)
        self._size = size if known else None
        self._groups = max(batch // size, 1) if known else ops.maximum(batch // size, 1)
        self._group = ops.minimum(ops.arange(batch) // size, self._groups - 1)

    def count(self, x, mask):
        if mask is None:
            ones = [1 if i in self._axes else n for i, n in enumerate(ops.shape(x))]
            mask = ops.ones(ones, "bool")
        return self.sum(ops.cast(mask, x.dtype))

    def statistic(self, value):
        """A value per group and channel, with the groups along the leading axis."""
        return ops.reshape(value, [self._groups, *(value.shape[a] for a in self._axes)])

    def near(self, x, mask):
        return self._largest(ops.stop_gradient(x), mask)

    def _few(self, x):
        return None

    def sum(self, x):
        """The sum over what belongs to one channel of one group."""
        return self._by_group(x, ops.sum, ops.segment_sum)

    def max(self, x):
        return self._by_group(x, ops.amax, ops.segment_max)

    def _by_group(self, x, reduce, by_segment):
        samples = reduce(x, self._rows[1:], keepdims=True) if self._rows[1:] else x
        if self._size is None:
            return by_segment(samples, self._group, self._groups)
        # Keras's `segment_sum` adds up in float32 on PyTorch.
        groups, rest = self._groups - 1, samples.shape[1:]
        first, last = samples[: groups * self._size], samples[groups * self._size :]
        last = reduce(last, 0, keepdims=True)
        if not groups:
            return last
        first = reduce(ops.reshape(first, (groups, self._size, *rest)), 1)
        return ops.concatenate([first, last])

    def broadcast(self, value):
        """The statistics of each sample's own group."""
        return ops.take(value, self._group, axis=0)

    def total(self, value):
        return ops.sum(value, 0, keepdims=True)


def layout_of(x, plan) -> Layout:
    """The layout of the formulas for an input, by its `Plan`."""
    if plan.group_size is None:
        return Layout(x, plan.axes, plan.xla)
    return Grouped(x, plan.axes, plan.group_size, plan.xla)


def _reshaped(value, shape):
    return value if list(value.shape) == list(shape) else ops.reshape(value, shape)
