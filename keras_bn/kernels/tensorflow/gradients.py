"""How a gradient is attached to what TensorFlow has computed."""

import weakref

import tensorflow as tf

# TensorFlow has no public way to forget the gradient of a graph that is gone.
from tensorflow.python.framework.ops import gradient_registry

# What each graph has in the registry, its backward pass included.
_names: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


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
    if tf.executing_eagerly():
        return tf.custom_gradient(lambda *_: (outputs, vjp))(*inputs)
    names = _names.setdefault(tf.compat.v1.get_default_graph(), [])

    def backward(*upstreams):
        _names[tf.compat.v1.get_default_graph()] = names
        return vjp(*upstreams)

    outputs = tf.custom_gradient(lambda *_: (outputs, backward))(*inputs)
    names.append(tf.nest.flatten(outputs)[0].op.get_attr("_gradient_op_type").decode())
    return outputs


def forget(graph):
    """Take the gradients of a graph out of the registry, which keeps it in memory."""
    for name in _names.pop(graph, ()):
        gradient_registry._registry.pop(name, None)
