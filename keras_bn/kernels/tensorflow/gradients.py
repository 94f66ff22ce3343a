"""How a gradient is attached to what TensorFlow has computed."""

import tensorflow as tf


def with_gradients(outputs, inputs, vjp):
    """`outputs`, with gradients of our own with respect to `inputs`.

    What is computed stays outside of the custom gradient, which ties its results into
    one node: where a weight's update hung on another of them, the optimizer of graphs
    took the way from one to the other for an order in time, then cut the knot.

    Args:
        outputs: a tensor or several, computed from the inputs.
        inputs: list of tensors.
        vjp: takes the upstream gradients of the outputs, returns the gradients with
            respect to the inputs.

    Returns:
        Tensors equal to the outputs.
    """
    return tf.custom_gradient(lambda *_: (outputs, vjp))(*inputs)
