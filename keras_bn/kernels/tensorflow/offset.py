"""An offset per channel, and its gradient."""

import tensorflow as tf
from keras import ops

from keras_bn.kernels.layout import broadcast
from keras_bn.kernels.tensorflow.context import in_xla, on_gpu
from keras_bn.kernels.tensorflow.gradients import with_gradients


def add_offset(x, offset, axis):
    """`x + offset`, with one value per channel; see the contract of the kernels.

    On a CPU, TensorFlow computes the addition as one with a convolution before it and a
    ReLU behind it. It would also compute `BiasAddGrad`, the gradient of the offset, as
    one with the gradient of the kernel, and oneDNN takes longer for that than for both
    (`benchmarks/NOTES.md`). So that gradient is a product with ones here.
    """
    y = ops.add(x, broadcast(offset, x.shape, (axis,)))
    image = len(x.shape) == 4 and axis == 3
    if not image or x.dtype.size < 4 or in_xla() or on_gpu():
        return y

    def backward(upstream):
        rows = tf.reshape(upstream, [-1, offset.shape[0]])
        ones = tf.ones([1, tf.shape(rows)[0]], rows.dtype)
        return upstream, tf.reshape(ones @ rows, [-1])

    return with_gradients(y, [x, offset], backward)
