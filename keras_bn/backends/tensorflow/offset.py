"""An offset per channel, and its gradient."""

import tensorflow as tf

from keras_bn.backends import layout
from keras_bn.backends.tensorflow import private
from keras_bn.backends.tensorflow.context import in_xla, on_gpu
from keras_bn.moments import Tensor


def add_offset(x: Tensor, offset: Tensor, axis: int) -> Tensor:
    """`x + offset`, with one value per channel; see the contract of the backends.

    On a CPU, TensorFlow computes the addition as one with a convolution before it and a
    ReLU behind it. It would also compute `BiasAddGrad`, the gradient of the offset, as
    one with the gradient of the kernel, and oneDNN takes longer for that than for both
    (`benchmarks/NOTES.md`). It does not if the one takes another tensor than the other.
    """
    image = len(x.shape) == 4 and axis == 3
    if not image or private.record is None or in_xla() or on_gpu():
        return layout.add_offset(x, offset, axis)

    def backward(upstream):
        rows = tf.reshape(upstream, [-1, offset.shape[0]])
        return upstream, tf.raw_ops.BiasAddGrad(out_backprop=rows)

    # For a tape alone: a gradient without one is that of an addition, as right as this.
    with private.record.stop_recording():
        y = x + offset
    private.record.record_operation("add_offset", [y], [x, offset], backward)
    return y
