"""How a gradient is attached to what TensorFlow has computed."""

import tensorflow as tf


def with_gradients(outputs, inputs, vjp):
    """`outputs`, with gradients of our own with respect to `inputs`.

    The outputs are computed outside of `tf.custom_gradient`, which passes all of its
    results through one IdentityN op. If the update of a weight depended on another
    result of that op, TensorFlow's graph optimizer (Grappler) would take the path
    between them for a control dependency, and then cut it: the output might read the
    weight after its update (`tests/test_update_order.py`).

    Args:
        outputs: a tensor or several, computed from the inputs.
        inputs: list of tensors.
        vjp: takes the upstream gradients of the outputs, returns the gradients with
            respect to the inputs.

    Returns:
        Tensors equal to the outputs.
    """
    return tf.custom_gradient(lambda *_: (outputs, vjp))(*inputs)
