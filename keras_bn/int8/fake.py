"""Fake quantization by the backend's op: rounding in floats, with gradients.

On TensorFlow it is the op that the converter knows; Keras has one for the others, which
gives the same bits. Its gradient is that of the identity for values within the range,
and 0 for those outside of it.
"""

import keras
from keras.quantizers import fake_quant_with_min_max_vars


def per_tensor(x, low, high):
    """A tensor rounded to 256 values between two bounds, 0 among them.

    Args:
        x: tensor of float32.
        low, high: scalars, 0 or less and 0 or greater, not equal.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.quantization.fake_quant_with_min_max_vars(x, low, high)
    return fake_quant_with_min_max_vars(x, low, high)


def per_channel(x, limit):
    """A tensor rounded to 255 values that lie symmetric about 0.

    Args:
        x: tensor of float32 with its channels along the last axis.
        limit: the largest value of each channel, greater than 0.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Keras's op transposes before and after, which costs a copy of the weights.
        return tf.quantization.fake_quant_with_min_max_vars_per_channel(
            x, -limit, limit, narrow_range=True
        )
    return fake_quant_with_min_max_vars(x, -limit, limit, narrow_range=True, axis=-1)
