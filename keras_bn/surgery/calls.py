"""A model run call by call, so that each call can be named and its output seen."""

import functools
import itertools
from typing import Any, NamedTuple

import keras

from keras_bn.surgery.graph import functional_class, graph_of, nodes
from keras_bn.surgery.private import NONE_HIDES_TRAINING


class Call(NamedTuple):
    """One call of a layer or operation, in a model or in a model inside it.

    Args:
        number: its place in calling order, from 0.
        path: the names of the layers around it and its own, joined with slashes.
        operation: the layer or operation.
    """

    number: int
    path: str
    operation: Any


def check_graph(view):
    """Refuse a model whose calls are not all known.

    Args:
        view: its `ModelView`.

    Raises:
        ValueError: if it is not built, or not Functional or Sequential, or has such a
            model in it.
    """
    for name, layer in view.of_type(keras.Model).items():
        kind = type(layer)
        if kind.call not in (functional_class().call, keras.Sequential.call):
            raise ValueError(
                f"'{name}' is neither a Functional nor a Sequential model but a "
                f"{kind.__name__} with a `call` of its own, so the order of its layers "
                "is not known. Build it as `keras.Model(inputs, outputs)`."
            )
        if graph_of(layer) is None:
            raise ValueError(
                f"'{name}' is not built. Give it a `keras.Input`, or call it on data."
            )


def as_declared(model, x):
    """A single input in the structure that a model was made with, as `[x]`.

    Keras takes it in any, and warns of others than that.
    """
    declared, leaves = getattr(model, "input", None), keras.tree.flatten(x)
    if len(leaves) == 1 == len(keras.tree.flatten(declared)):
        return keras.tree.pack_sequence_as(declared, leaves)
    return x


def as_list(model, inputs):
    """The inputs of a model in any structure that it takes, as a list of tensors."""
    graph = graph_of(model)
    return graph._standardize_inputs(as_declared(graph, inputs))


def run(model, inputs, around):
    """Run a model in inference, with a function around each call.

    Args:
        model: a Functional or Sequential model.
        inputs: a list of tensors or arrays, in the order of `model.inputs`.
        around: `around(call, function)` gets a `Call`, and gives the outputs of the
            call, which `function()` computes: a `functools.partial`, with the arguments
            of the call.

    Returns:
        The outputs, a list in the order of `model.outputs`.
    """
    indices = itertools.count()

    def through(holder, inputs, path):
        graph = graph_of(holder)
        inputs = [
            keras.ops.convert_to_tensor(x, dtype=t.dtype)
            for x, t in zip(keras.tree.flatten(inputs), graph.inputs, strict=True)
        ]
        return graph._run_through_graph(inputs, lambda op: called(op, path))

    def called(operation, path):
        path = (*path, operation.name)

        def call(*args, **kwargs):
            if graph_of(operation) is not None:
                tensors = args[0] if args else kwargs["inputs"]
                outputs = through(operation, tensors, path)
                # As Keras does for a model called in a graph.
                single = isinstance(outputs, list | tuple) and len(outputs) == 1
                return outputs[0] if single else outputs
            # As Keras does for a graph: a random crop has `training=True` by default.
            own = NONE_HIDES_TRAINING and kwargs.get("training") is not None
            if isinstance(operation, keras.Layer) and not own:
                kwargs["training"] = False
            this = Call(next(indices), "/".join(path), operation)
            return around(this, functools.partial(operation, *args, **kwargs))

        return call

    return keras.tree.flatten(through(model, inputs, ()))


def paths(graph, around=()):
    """The path of each call that `run` makes, of the graph of a model."""
    for node in nodes(graph):
        path = (*around, node.operation.name)
        inner = graph_of(node.operation)
        if inner is None:
            yield "/".join(path)
        else:
            yield from paths(inner, path)
