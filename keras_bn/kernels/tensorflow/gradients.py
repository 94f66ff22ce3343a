"""How a gradient is attached to what TensorFlow has computed."""

import tensorflow as tf


def with_gradients(outputs, inputs, vjp):
    """`outputs`, with gradients of our own with respect to `inputs`.

    The outputs are computed outside of `tf.custom_gradient`, which passes all of its
    results through one IdentityN op. Through it, TensorFlow's graph optimizer would see
    a path from the reading of beta to its update, drop the stated control dependency as
    redundant, and then remove the op: the output might hold the new beta
    (`tests/test_update_order.py`).

    Args:
        outputs: a tensor or several, computed from the inputs.
        inputs: list of tensors.
        vjp: takes the upstream gradients of the outputs, returns the gradients with
            respect to the inputs.

    Returns:
        Tensors equal to the outputs.
    """
    return tf.custom_gradient(lambda *_: (outputs, vjp))(*inputs)
