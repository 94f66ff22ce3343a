"""TensorFlow's fused op: the fewest passes over memory, forward and backward.

Three differences from the formulas are corrected here. The op sums one row after
another, so it would lose digits where means are large: it gets the input less a shift
near the mean, and the shift is added back to the mean. Its variance is unbiased. And
its gradient stops a gradient, as Keras's layer does: second derivatives are those of
the formulas.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_bn.backends import formulas
from keras_bn.backends.tensorflow.gradients import with_gradients
from keras_bn.moments import Moments

# Up to so many deviations, a mean loses as few digits in the op as in sums of Keras.
LARGE = 8


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass.

    Args:
        shifted: the input less the shift.
        gamma: the scale.
        reserve: what the op's gradient needs: its mean, its variance, on a GPU more.
        count: how many elements each statistic rests on, 1 at least.
    """

    shifted: Any
    gamma: Any
    reserve: Any
    count: Any


def forward(x, gamma, beta, *, epsilon, layout, gpu=False):
    """Normalize a batch with its own statistics; see `formulas.forward`.

    Args:
        x: input of four axes, the channels last, float32.
        gamma, beta, epsilon, layout: as there.
        gpu: whether the op is cuDNN's, which does not return the population variance.

    Returns:
        `(y, moments, kept)`: as there, and `Kept`.
    """
    near, rest, shifted = layout.shifted(x, None)
    count = layout.count(x, None)
    n = tf.maximum(count, 1)
    y, mean, variance, *reserve = op(shifted, gamma, beta, epsilon)
    variance = variance * (tf.maximum(count - 1, 1) / n) if gpu else reserve[1]
    kept = Kept(shifted, gamma, reserve, n)
    mean = near + formulas.beyond(rest, mean)
    return y, Moments(count, mean, variance), kept


def backward(kept: Kept, upstream, *, epsilon, layout):
    """`(dx, d_gamma, d_beta)` of what `forward` kept; see `formulas.backward`."""

    def first(upstream, kept):
        return gradient_op(upstream, kept.shifted, kept.gamma, kept.reserve, epsilon)

    return differentiable(first, upstream, kept, epsilon, layout)


def op(x, gamma, beta, epsilon):
    """The op: `y`, mean, unbiased variance, and three tensors for its gradient.

    On a CPU these are the mean, the population variance, and nothing.
    """
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=gamma,
        offset=beta,
        mean=[],
        variance=[],
        epsilon=epsilon,
        is_training=True,
    )


def moments(x, *, epsilon, layout):
    """The `Moments` of a batch on a CPU; by the shift only where means are large.

    Where the shift is not needed, this saves a pass over the input.

    Args:
        x, epsilon, layout: as for `forward`.
    """
    one, zero = (layout.parameter(None, value, x.dtype) for value in (1.0, 0.0))
    _, mean, _, _, variance, _ = op(x, one, zero, epsilon)

    def by_shift():
        return forward(x, one, zero, epsilon=epsilon, layout=layout)[1][1:]

    large = tf.reduce_any(tf.square(mean) > LARGE**2 * (variance + epsilon))
    mean, variance = tf.cond(large, by_shift, lambda: (mean, variance))
    return Moments(layout.count(x, None), mean, variance)


def inference_op(x, mean, scale, offset):
    """`(x - mean) * scale + offset`, in one pass; the mean is a constant."""
    return tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=scale,
        offset=offset,
        mean=mean,
        variance=tf.ones_like(mean),
        epsilon=0.0,
        is_training=False,
    ).y


def gradient_op(upstream, x, gamma, reserve, epsilon):
    """The op for the gradients: `dx`, `d_gamma` and `d_beta`."""
    dx, d_gamma, d_beta, *_ = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=upstream,
        x=x,
        scale=gamma,
        reserve_space_1=reserve[0],
        reserve_space_2=reserve[1],
        reserve_space_3=reserve[2] if len(reserve) > 2 else [],
        epsilon=epsilon,
        is_training=True,
    )
    return dx, d_gamma, d_beta


def differentiable(first, upstream, kept: Kept, epsilon, layout):
    """The gradients `first(upstream, kept)`, with the derivatives of the formulas."""
    upstream, *kept = tf.nest.map_structure(_here, [upstream, *kept])
    kept = Kept(*kept)
    inputs = [upstream, kept.shifted, kept.gamma]

    def second(*upstreams):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            _, variance, centred = formulas.statistics(
                kept.shifted, None, kept.count, layout
            )
            saved = formulas.Saved(centred, variance, kept.gamma, kept.count)
            gradients = formulas.backward(
                saved, upstream, epsilon=epsilon, layout=layout
            )
        return tape.gradient(gradients, inputs, upstreams)

    return with_gradients(first(upstream, kept), inputs, second)


def _here(tensor):
    """The tensor, brought into the graph of the backward pass if that is another graph.

    Only then can a derivative of the backward pass reach it.
    """
    if tf.executing_eagerly() or tensor.graph is tf.compat.v1.get_default_graph():
        return tensor
    return tf.identity(tensor)
