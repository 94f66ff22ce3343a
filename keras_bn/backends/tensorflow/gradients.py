"""How a gradient is attached to what TensorFlow has computed."""

import itertools
import weakref

import tensorflow as tf

from keras_bn.backends.tensorflow import private

# What each graph has in the registry, its backward pass included.
_names: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def with_gradients(outputs, inputs, vjp):
    """`outputs`, with gradients of our own with respect to `inputs`.

    The outputs are computed outside of this function, not inside as for
    `tf.custom_gradient`, which passes all of its results through one op. Through it,
    TensorFlow's graph optimizer would see a path from the reading of beta to its
    update, drop the stated control dependency as redundant, and then remove the op: the
    output might hold the new beta (`tests/layer/test_update_order.py`).

    In a graph, `tf.custom_gradient` also searches all that the outputs come from for
    variables, 6 % of all calls of Python in a first step. There are none here.

    Args:
        outputs: a tensor or several, computed from the inputs.
        inputs: list of tensors.
        vjp: takes the upstream gradients of the outputs, returns the gradients with
            respect to the inputs.

    Returns:
        Tensors equal to the outputs.
    """
    if tf.executing_eagerly() or private.record is None:
        return _by_custom_gradient(outputs, inputs, vjp)
    graph, flat = tf.compat.v1.get_default_graph(), tf.nest.flatten(outputs)
    names = _names.setdefault(graph, [])
    name = f"CustomGradient-keras_bn-{next(_numbers)}"

    def backward(*upstreams):
        _names[tf.compat.v1.get_default_graph()] = names
        return [*[None] * len(flat), *vjp(*upstreams[: len(flat)])]

    # A tape asks for the gradient by what is recorded, a graph by the registry.
    tf.RegisterGradient(name)(lambda op, *upstreams: backward(*upstreams))
    names.append(name)
    override = graph.gradient_override_map({"IdentityN": name})
    with private.record.stop_recording(), override:
        held = tf.identity_n([*flat, *inputs])
    held = held[: len(flat)]
    private.record.record_operation(name, held, [*flat, *inputs], backward)
    return tf.nest.pack_sequence_as(outputs, held)


def _by_custom_gradient(outputs, inputs, vjp):
    """The same, by TensorFlow's public name; the variables that it finds have no part.

    It looks for them in all that the outputs come from, layers before this one too.
    """

    def backward(*upstreams, variables=()):
        gradients = vjp(*upstreams)
        return (gradients, [None] * len(variables)) if variables else gradients

    return tf.custom_gradient(lambda *_: (outputs, backward))(*inputs)


def forget(graph):
    """Take the gradients of a graph out of the registry, which keeps it in memory."""
    for name in _names.pop(graph, ()):
        private.forget_gradient(name)
