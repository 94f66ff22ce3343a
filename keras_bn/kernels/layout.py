"""Where the channels of an input are, and how its statistics line up with it."""

import math

import tensorflow as tf

from keras_bn.kernels import dispatch

# How a large input is summed for XLA on a CPU: cut into FOLD strips, which are added
# up; what is left of strips of rows is summed in up to PARTS parts.
FOLD, PARTS = 8, 16


def at_least_float32(x):
    """`x` in float32, or as it is when that is float64: half types can't hold sums."""
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def broadcast(value, shape, axes):
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
    return tf.reshape(value, sizes)


def count_of(x, channels, dtype):
    """How many elements of `x` belong to each of its channels: a scalar of `dtype`."""
    if x.shape.is_fully_defined():
        return tf.constant(x.shape.num_elements() // channels, dtype)
    return tf.cast(tf.size(x, tf.int64) // channels, dtype)


class Layout:
    """Moves between the shapes of the caller and those the arithmetic runs in.

    Inside a kernel the input is `inner(x)`, and every statistic or parameter has a
    shape that broadcasts against it, so that no formula mentions an axis. With the
    channels last, in one axis or several, statistics are as they come; otherwise they
    have sizes of 1 in between.

    Args:
        x: the input, with known sizes along `axes`.
        axes: the channel axes, non-negative and ascending.
    """

    def __init__(self, x, axes):
        rank = len(x.shape)
        self._shape = x.shape
        self._channels = [x.shape[axis] for axis in axes]
        self._rows = [axis for axis in range(rank) if axis not in axes]
        last = tuple(axes) == tuple(range(rank - len(axes), rank))
        self._summed, self._keepdims = self._rows, not last
        self._inner = self._channels
        if not last:
            self._inner = [x.shape[i] if i in axes else 1 for i in range(rank)]

    def inner(self, x):
        """`x` in the shape the arithmetic runs in."""
        return x

    def outer(self, y, x):
        """`y`, of the inner shape, in the shape of the input `x`."""
        y.set_shape(self._shape)
        return y

    def parameter(self, value, dtype):
        """A value per channel, or one number for all, in the inner shape."""
        if isinstance(value, float):
            return tf.fill(self._inner, tf.constant(value, dtype))
        value = tf.cast(value, dtype)
        return value if value.shape == self._inner else tf.reshape(value, self._inner)

    def statistic(self, value):
        """A value per channel, from the inner shape back to the caller's."""
        if value.shape.rank == 0 or value.shape == self._channels:
            return value
        return tf.reshape(value, self._channels)

    def mask(self, mask, x):
        """The mask as it broadcasts against `inner(x)`; None stays None."""
        if mask is None:
            return None
        sizes, rank = tf.shape(x), len(self._shape)
        mask = tf.broadcast_to(mask, tf.gather(sizes, self._rows))
        return tf.reshape(
            mask, [sizes[i] if i in self._rows else 1 for i in range(rank)]
        )

    def count(self, mask, x, dtype):
        """How many elements stand behind each statistic: a scalar of `dtype`."""
        if mask is not None:
            return tf.reduce_sum(tf.cast(mask, dtype))
        return count_of(x, math.prod(self._channels), dtype)

    def sum(self, x):
        """The sum over everything that belongs to one channel, in the inner shape."""
        return tf.reduce_sum(x, self._summed, keepdims=self._keepdims)

    def mean(self, x):
        """The mean of all that belongs to one channel; NaN of nothing."""
        return tf.reduce_mean(x, self._summed, keepdims=self._keepdims)

    def near_mean(self, x):
        """A mean of enough of each channel to be within some deviations of all."""
        return self.mean(x)

    def spread(self, value):
        """A statistic as it broadcasts against the input: as it is."""
        return value

    def total(self, value):
        """The sum of a statistic over the groups of the batch: here is only one."""
        return value


class Flat(Layout):
    """The layout that XLA is fastest in: rows, channels, and what comes after them.

    It has the fewest axes. But XLA on a CPU sums what it has just computed, squares of
    differences say, in one thread and without vectors. So the rows of a large input, or
    what comes after its channels, are cut into FOLD strips if their known sizes allow:
    these it adds up as fast as any elements, and what is left is multiplied with ones.

    Args:
        x: the input, with known sizes along `axes` and after them.
        axes: the channel axes, neighbours in ascending order.
    """

    def __init__(self, x, axes):
        super().__init__(x, axes)
        rows, rest = x.shape[: axes[0]], x.shape[axes[-1] + 1 :]
        self._last = not rest.rank
        cut = math.prod(size or 1 for size in (rows if self._last else rest))
        channels = math.prod(self._channels)
        pays = dispatch.by_strips(x.shape, channels)
        # A GPU needs no strips, and multiplies in fewer bits.
        self._folds = pays and cut % FOLD == 0 and not dispatch.on_gpu()
        self._strip = cut // FOLD
        if self._last:
            self._before, self._after = ([FOLD, -1] if self._folds else [-1]), []
            self._inner = [channels]
        else:
            self._before = [-1]
            self._after = [FOLD, self._strip] if self._folds else [cut]
            self._inner = [1, channels] + [1] * len(self._after)
        sizes = self._sizes(channels)
        self._summed = [i for i in range(len(sizes)) if i != len(self._before)]

    def _sizes(self, channels):
        return [*self._before, channels, *self._after]

    def inner(self, x):
        return tf.reshape(x, self._sizes(math.prod(self._channels)))

    def outer(self, y, x):
        return super().outer(tf.reshape(y, tf.shape(x)), x)

    def mask(self, mask, x):
        mask = super().mask(mask, x)
        return None if mask is None else tf.reshape(mask, self._sizes(1))

    def sum(self, x):
        if not self._folds:
            return super().sum(x)
        # Were what follows a sum too, XLA would make one slow sum of both.
        if self._last:
            parts = math.gcd(self._strip, PARTS)
            strip = tf.reshape(tf.reduce_sum(x, 0), [parts, -1, *self._inner])
            sums = tf.matmul(tf.ones([parts, 1, tf.shape(strip)[1]], x.dtype), strip)
        else:
            strip = tf.reshape(tf.reduce_sum(x, 2), [-1, self._strip])
            sums = tf.matmul(strip, tf.ones([self._strip, 1], x.dtype))
        return tf.reduce_sum(tf.reshape(sums, [-1, *self._inner]), 0)

    def mean(self, x):
        if not self._folds:
            return super().mean(x)
        return self.sum(x) / self.count(None, x, x.dtype)

    def near_mean(self, x):
        if not self._folds:
            return super().near_mean(x)
        # The mean of a strip is off by at most (FOLD − 1)^½ standard deviations.
        strip = x[:1] if self._last else x[:, :, :1]
        return tf.reduce_mean(strip, self._summed, keepdims=self._keepdims)


class Grouped(Layout):
    """The layout of a batch cut in order into groups, each with its own statistics.

    A batch of `n` gives `max(1, n // size)` groups of `size`, the last taking the
    remainder. Statistics have the groups along the leading axis of the inner shape,
    where the input has its batch.

    Args:
        x: the input, with known sizes along `axes` and the batch in axis 0.
        axes: the channel axes, non-negative and ascending, without axis 0.
        size: how many samples make a group.
    """

    def __init__(self, x, axes, size):
        super().__init__(x, axes)
        self._axes = axes
        self._inner = [d if i in axes else 1 for i, d in enumerate(x.shape)]
        self._summed = self._rows[1:]
        batch = tf.shape(x)[0]
        self._groups = tf.maximum(1, batch // size)
        self._group = tf.minimum(tf.range(batch) // size, self._groups - 1)

    def count(self, mask, x, dtype):
        """How many elements stand behind the statistics of each group."""
        if mask is None:
            mask = self.mask(True, x)
        return self.sum(tf.cast(mask, dtype))

    def statistic(self, value):
        """A value per group and channel, with the groups along the leading axis."""
        return tf.reshape(value, [self._groups, *(value.shape[a] for a in self._axes)])

    def sum(self, x):
        """The sum over what belongs to one channel of one group."""
        samples = tf.reduce_sum(x, self._summed, keepdims=True)
        return tf.math.unsorted_segment_sum(samples, self._group, self._groups)

    def spread(self, value):
        """The statistics of each sample's own group."""
        return tf.gather(value, self._group)

    def total(self, value):
        """The sum of a statistic over the groups."""
        return tf.reduce_sum(value, 0, keepdims=True)


def layout_of(x, axes, group_size=None):
    """The layout for the arithmetic on an input.

    Args:
        x: the input, with known sizes along `axes`.
        axes: the channel axes, non-negative and ascending.
        group_size: of the groups that the batch is cut into, or None.
    """
    if group_size is not None:
        return Grouped(x, axes, group_size)
    neighbours = axes[-1] - axes[0] < len(axes)
    rest = x.shape[axes[-1] + 1 :]
    flat = dispatch.in_xla() and neighbours and rest.is_fully_defined()
    return Flat(x, axes) if flat else Layout(x, axes)
