"""Fake quantization by TensorFlow's ops: rounding in floats, with gradients.

The only place that names these ops. Their gradient is that of the identity for values
within the range, and 0 for those outside of it.
"""

from keras_bn.int8.tflite import check_backend


def per_tensor(x, low, high, bits=8):
    """A tensor rounded to `2**bits` values between two bounds, 0 among them.

    Args:
        x: tensor of float32.
        low, high: scalars, 0 or less and 0 or greater, not equal.
        bits: from 2 to 16.
    """
    check_backend("keras_bn.quantize_aware")
    import tensorflow as tf

    return tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=bits)


def per_channel(x, limit, bits=8):
    """A tensor rounded to `2**bits - 1` values that lie symmetric about 0.

    Args:
        x: tensor of float32 with its channels along the last axis.
        limit: the largest value of each channel, greater than 0.
        bits: from 2 to 16.
    """
    check_backend("keras_bn.quantize_aware")
    import tensorflow as tf

    return tf.quantization.fake_quant_with_min_max_vars_per_channel(
        x, -limit, limit, num_bits=bits, narrow_range=True
    )
