"""How a gradient is attached to what TensorFlow has computed."""

import weakref

import tensorflow as tf

# TensorFlow has no public way to forget the gradient of a graph that is gone.
from tensorflow.python.framework.ops import gradient_registry

# What each graph has in the registry, its backward pass included.
_names: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def with_gradients(outputs, inputs, vjp):
    """`outputs`, with gradients of our own with respect to `inputs`.

    The outputs are computed outside of `tf.custom_gradient`, which passes all of its
    results through one IdentityN op. Through it, TensorFlow's graph optimizer would see
    a path from the reading of beta to its update, drop the stated control dependency as
    redundant, and then remove the op: the output might hold the new beta
    (`tests/layer/test_update_order.py`).

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
