"""The fused op or the formulas, chosen at run time by the size of the batch.

For matrices and sequences whose size is unknown while tracing: the op takes 0.2 ms to
start, too much for small ones. The conditional costs 10 µs, forward and backward.
"""

import tensorflow as tf

from keras_bn.backends import formulas
from keras_bn.backends.plan import FUSED_FROM
from keras_bn.backends.tensorflow import fused
from keras_bn.moments import Moments


def forward(x, gamma, beta, *, epsilon, layout):
    """Normalize a batch with its own statistics; see `formulas.forward`.

    Args:
        x: input with the channels last, float32.
        gamma, beta, epsilon, layout: as there.

    Returns:
        `(y, moments, kept)`: as there, and `fused.Kept`.
    """
    near, rest, shifted = layout.shifted(x, None)
    count = layout.count(x, None)
    n = tf.maximum(count, 1)

    def by_op():
        image = tf.reshape(shifted, [-1, 1, 1, x.shape[-1]])
        y, mean, _, _, variance, _ = fused.op(image, gamma, beta, epsilon)
        return tf.reshape(y, tf.shape(shifted)), mean, variance

    def by_formulas():
        mean, variance, centred = formulas.statistics(shifted, None, n, layout)
        saved = formulas.Saved(centred, variance, gamma, n)
        y = formulas.normalize(saved, beta, epsilon=epsilon, layout=layout)
        return y, mean, variance

    large = count >= FUSED_FROM / x.shape[-1]
    y, mean, variance = tf.cond(large, by_op, by_formulas)
    kept = fused.Kept(shifted, gamma, [mean, variance], n)
    mean = near + formulas.beyond(rest, mean)
    return y, Moments(count, mean, variance), kept


def backward(kept: fused.Kept, upstream, *, epsilon, layout):
    """`(dx, d_gamma, d_beta)` of what `forward` kept; see `formulas.backward`."""

    def first(upstream, kept):
        shifted, gamma, reserve, count = kept

        def by_op():
            shape = [-1, 1, 1, shifted.shape[-1]]
            images = tf.reshape(upstream, shape), tf.reshape(shifted, shape)
            dx, *others = fused.gradient_op(*images, gamma, reserve, epsilon)
            return tf.reshape(dx, tf.shape(shifted)), *others

        def by_formulas():
            mean, variance = reserve
            saved = formulas.Saved(shifted - mean, variance, gamma, count)
            return formulas.backward(saved, upstream, epsilon=epsilon, layout=layout)

        large = count >= FUSED_FROM / shifted.shape[-1]
        return tf.cond(large, by_op, by_formulas)

    return fused.differentiable(first, upstream, kept, epsilon, layout)
