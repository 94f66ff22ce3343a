"""TensorFlow's fused op, its differences from the plain kernel made good."""

import tensorflow as tf

from keras_bn.kernels import plain
from keras_bn.kernels.layout import count_of
from keras_bn.moments import Moments


def normalize_batch(x, gamma, beta, *, axes, epsilon):
    """Normalize with the statistics of the batch; see `plain.normalize_batch`.

    Fewer passes over memory than any composition of ops, forward and backward, and
    nothing but `x` kept alive between them. Its two-pass moments are as accurate as
    Keras's; its own second derivative is not (it stops a gradient, as Keras's layer
    does), so that is taken from the plain kernel.

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
    gamma = tf.ones([channels]) if gamma is None else tf.cast(gamma, tf.float32)
    beta = tf.zeros([channels]) if beta is None else tf.cast(beta, tf.float32)

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        inner = _to_rank_4(x, axis)
        y, mean, variance, *saved = tf.raw_ops.FusedBatchNormV3(
            x=inner,
            scale=gamma,
            offset=beta,
            mean=[],
            variance=[],
            epsilon=epsilon,
            is_training=True,
        )

        def gradient(upstream, *_):
            # Copies belong to the graph of the backward pass, from where alone the
            # second derivative of a function differentiated from outside sees them.
            return differentiate(*map(tf.identity, (upstream, x, gamma, *saved)))

        return (_from_rank_4(y, x, axis), mean, variance), gradient

    @tf.custom_gradient
    def differentiate(upstream, x, gamma, *saved):
        dx, d_gamma, d_beta, *_ = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=_to_rank_4(upstream, axis),
            x=_to_rank_4(x, axis),
            scale=gamma,
            reserve_space_1=saved[0],
            reserve_space_2=saved[1],
            reserve_space_3=saved[2],
            epsilon=epsilon,
            is_training=True,
        )

        def gradient(*upstreams):
            beta = tf.zeros_like(gamma)  # without part in any gradient
            with tf.GradientTape() as outer:
                outer.watch([upstream, x, gamma])
                with tf.GradientTape() as inner:
                    inner.watch([x, gamma, beta])
                    y, _ = plain.normalize_batch(
                        x, None, gamma, beta, axes=axes, epsilon=epsilon
                    )
                first = inner.gradient(y, [x, gamma, beta], upstream)
            second = outer.gradient(first, [upstream, x, gamma], upstreams)
            return *second, *(None for _ in saved)

        return (_from_rank_4(dx, x, axis), d_gamma, d_beta), gradient

    y, mean, variance = normalize(x, gamma, beta)
    count = count_of(x, channels, tf.float32)
    # The op gives the unbiased variance, of one element too.
    variance *= tf.maximum(count - 1, 1) / tf.maximum(count, 1)
    moments = (count, mean, variance)
    return y, Moments(*(tf.stop_gradient(m) for m in moments))


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
