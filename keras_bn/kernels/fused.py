"""TensorFlow's fused op, its differences from the plain kernel made good."""

import math

import tensorflow as tf

from keras_bn.kernels import dispatch, plain
from keras_bn.kernels.layout import count_of
from keras_bn.moments import Moments

# From here on, a mean in standard deviations is too large for the op: it sums x as it
# is, and the error of that sum grows with the mean. The plain kernel is right at any.
LARGE_MEAN = 8.0

# The op adds up rows one after another, half of them in each of two threads, and from
# here on loses more than twice what pairwise sums do: the rows are then cut into parts
# and what the parts give is merged.
PARTS_FROM = 1024

# How many parts at most: for sums in one pass, of PART rows at least; and for the op,
# which has them as columns of their own.
PARTS, PART, COLUMNS = 256, 16, 16


def normalize_batch(x, gamma, beta, *, axes, epsilon):
    """Normalize with the statistics of the batch; see `plain.normalize_batch`.

    The op takes fewer passes over memory than any composition of others, forward and
    backward, and only `x` stays alive between them. What it does worse is left to the
    plain kernel: batches with a large mean in any channel, which is found out when
    they come; and the second derivative, where the op stops a gradient as Keras's
    layer does.

    Args:
        x: input of dtype float16, bfloat16 or float32.
        gamma, beta: scale and offset, one value per channel, or None.
        axes: the one channel axis of `x`, as a tuple.
        epsilon: added to the variance, non-negative.

    Returns:
        `(y, Moments)`, as `plain.normalize_batch`.
    """
    (axis,) = axes
    channels = x.shape[axis]
    gamma = tf.ones([channels]) if gamma is None else _float32(gamma)
    beta = tf.zeros([channels]) if beta is None else _float32(beta)
    count = count_of(x, channels, tf.float32)

    def slowly(x, gamma, beta):
        return plain.normalize_batch(x, None, gamma, beta, axes=(3,), epsilon=epsilon)

    def slow_gradients(x, gamma, upstream):
        beta = tf.zeros_like(gamma)  # without part in any gradient
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, _ = slowly(x, gamma, beta)
        return tape.gradient(y, [x, gamma, beta], upstream)

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        def at_once():
            y, mean, variance, *saved = _op(x, gamma, beta, epsilon)
            return y, mean, _biased(variance, count), *saved

        def in_parts():
            mean, variance = _moments(x, epsilon)
            y, _, _, _, _, other = _op(x, gamma, beta, epsilon, mean, variance)
            return y, mean, variance, mean, variance, other

        # Of an unknown batch there is one sample at least, or nothing to be wrong.
        least = math.prod(size or 1 for size in x.shape[:3])
        few = x.shape.is_fully_defined() and least < PARTS_FROM
        # What cuDNN saves for the backward pass is its own.
        if few or dispatch.on_gpu():
            found = at_once()
        elif least >= PARTS_FROM:
            found = in_parts()
        else:
            found = tf.cond(count < PARTS_FROM, at_once, in_parts)
        y, mean, variance, *saved = found

        def fast():
            return y, mean, variance

        def slow():
            y, moments = slowly(x, gamma, beta)
            return y, moments.mean, moments.variance

        # A GPU would have to stop and tell the host.
        large = None if dispatch.on_gpu() else _any_large(mean, variance, epsilon)

        def gradient(upstream, *_):
            # Copies belong to the graph of the backward pass, from where alone the
            # second derivative of a function differentiated from outside sees them.
            copy = tf.identity
            upstream = tf.cast(copy(upstream), x.dtype)
            return differentiate(upstream, copy(x), copy(gamma), large, saved)

        return (fast() if large is None else tf.cond(large, slow, fast)), gradient

    def differentiate(upstream, x, gamma, large, saved):
        def fast(upstream, x, gamma):
            dx, d_gamma, d_beta, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=upstream,
                x=x,
                scale=gamma,
                reserve_space_1=saved[0],
                reserve_space_2=saved[1],
                reserve_space_3=saved[2],
                epsilon=epsilon,
                is_training=True,
            )
            return dx, d_gamma, d_beta

        @tf.custom_gradient
        def gradients(upstream, x, gamma):
            def second(*upstreams):
                with tf.GradientTape() as tape:
                    tape.watch([upstream, x, gamma])
                    first = slow_gradients(x, gamma, upstream)
                return tape.gradient(first, [upstream, x, gamma], upstreams)

            if large is None:
                return fast(upstream, x, gamma), second
            first = tf.cond(
                large,
                lambda: tuple(slow_gradients(x, gamma, upstream)),
                lambda: fast(upstream, x, gamma),
            )
            return first, second

        return gradients(upstream, x, gamma)

    y, mean, variance = normalize(_to_rank_4(x, axis), gamma, beta)
    y = _from_rank_4(y, x, axis)
    return y, Moments(*(tf.stop_gradient(m) for m in (count, mean, variance)))


def _op(x, gamma, beta, epsilon, mean=None, variance=None):
    """The fused op, with the given statistics or with those of the batch."""
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=[] if mean is None else mean,
        variance=[] if variance is None else variance,
        epsilon=epsilon,
        is_training=mean is None,
    )


def _biased(variance, count):
    """The population variance; what the op gives is unbiased, but for one element."""
    return variance * (tf.maximum(count - 1, 1) / tf.maximum(count, 1))


def _moments(x, epsilon):
    """Mean and variance of each channel, from those of parts of the rows."""
    if x.dtype != tf.float32:
        return _moments_by_op(x, epsilon)
    mean, variance, near = _moments_about_zero(x)
    return tf.cond(near, lambda: (mean, variance), lambda: _moments_by_op(x, epsilon))


def _moments_about_zero(x):
    """The moments as one pass over `x` tells them, and whether that is near enough.

    It takes E[x²] − E[x]², whose error grows with the square of the mean in standard
    deviations. The sums are those of parts of the rows, merged in float64, and up to a
    square of a sixteenth of the number of parts (four standard deviations with all of
    them) have no more error than the two passes of Keras's layer.
    """
    matrix = tf.reshape(x, [-1, x.shape[-1]])
    count, known = tf.shape(matrix)[0], matrix.shape[0]
    if known is None:
        parts = tf.clip_by_value(count // PART, 1, PARTS)
    else:
        count, parts = known, min(max(known // PART, 1), PARTS)
    even = count // parts * parts
    sums, squares = _power_sums(matrix[:even], parts)
    if known is None or even < known:
        rest_sums, rest_squares = _power_sums(matrix[even:], 1)
        sums, squares = sums + rest_sums, squares + rest_squares
    count = tf.cast(count, tf.float64)
    mean = sums / count
    variance = tf.maximum(squares / count - tf.square(mean), 0)
    allowed = variance * tf.cast(parts, tf.float64) / 16
    near = ~tf.reduce_any(tf.square(mean) > allowed)
    return tf.cast(mean, tf.float32), tf.cast(variance, tf.float32), near


def _power_sums(x, parts):
    """The sums of the rows of `x` and of their squares, in float64, part by part."""
    x = tf.reshape(x, [parts, -1, x.shape[-1]])
    ones = tf.ones([parts, 1, tf.shape(x)[1]])
    sums = tf.cast(tf.matmul(ones, x)[:, 0], tf.float64)
    norms = tf.cast(tf.raw_ops.EuclideanNorm(input=x, axis=[1]), tf.float64)
    return tf.reduce_sum(sums, 0), tf.reduce_sum(tf.square(norms), 0)


def _moments_by_op(x, epsilon):
    """The moments by the op, each part of the rows a column of its own."""
    channels = x.shape[-1]
    matrix = tf.reshape(x, [-1, channels])
    rows = tf.shape(matrix)[0] // COLUMNS
    even = rows * COLUMNS
    width = COLUMNS * channels
    parts = tf.reshape(matrix[:even], [rows, 1, 1, width])
    _, mean, variance, *_ = _op(parts, tf.ones([width]), tf.zeros([width]), epsilon)
    variance = _biased(variance, tf.cast(rows, tf.float32))
    mean = tf.reshape(mean, [-1, channels])
    variance = tf.reshape(variance, [-1, channels])
    whole = mean[0] + tf.reduce_mean(mean - mean[0], 0)
    between = tf.reduce_mean(tf.math.squared_difference(mean, whole), 0)
    whole = Moments(even, whole, tf.reduce_mean(variance, 0) + between)
    rest = _float32(matrix[even:])
    _, mean, variance = whole.merge(
        Moments(tf.shape(rest)[0], *tf.nn.moments(rest, [0]))
    )
    return mean, variance


def _float32(parameter):
    """A parameter as a tensor: custom gradients treat variables apart."""
    return tf.cast(tf.convert_to_tensor(parameter), tf.float32)


def _any_large(mean, variance, epsilon):
    """Whether any channel's mean is too large for the op; NaN is not."""
    spread = tf.square(LARGE_MEAN) * (variance + epsilon)
    return tf.reduce_any(tf.square(mean) > spread)


def _to_rank_4(x, axis):
    """`x` with four axes, the channels last: all that the op takes on a CPU."""
    rank = len(x.shape)
    if axis != rank - 1:
        x = tf.transpose(x, [*range(axis), *range(axis + 1, rank), axis])
    return x if rank == 4 else tf.reshape(x, [-1, 1, 1, x.shape[-1]])


def _from_rank_4(y, x, axis):
    """`y`, as the op gives it, in the shape of the input `x`."""
    rank, shape = len(x.shape), tf.shape(x)
    last = [i for i in range(rank) if i != axis] + [axis]
    if rank != 4:
        y = tf.reshape(y, tf.gather(shape, last) if axis != rank - 1 else shape)
    if axis != rank - 1:
        y = tf.transpose(y, [last.index(i) for i in range(rank)])
    return tf.ensure_shape(y, x.shape)
