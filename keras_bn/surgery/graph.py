"""Walking Keras models: their layers, graphs and calls."""

import contextlib
import functools
import itertools
from typing import Any

import keras


def walk(model, path=()):
    """Every layer of a model to any depth, once, in Keras's order.

    Args:
        model: a layer or model.

    Returns:
        An iterator of `(path, layer)`, where `path` joins the names of the layers
        around it with slashes. The model itself comes first, with an empty path. Of
        two layers side by side with one name, as `clone_model` makes, the second is
        called `name_1`.
    """
    seen = set()

    def visit(layer, path):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        yield "/".join(path), layer
        for child, name in _named(children(layer)):
            yield from visit(child, (*path, name))

    return visit(model, tuple(path))


def _named(layers):
    """Pairs of each of some layers and a name that no other of them has."""
    layers = {id(layer): layer for layer in layers}.values()
    taken, names = {layer.name for layer in layers}, set()
    for layer in layers:
        name = layer.name
        if name in names:
            numbered = (f"{layer.name}_{i}" for i in itertools.count(1))
            name = next(each for each in numbered if each not in taken)
            taken.add(name)
        names.add(name)
        yield layer, name


def variables_of(model):
    """The variables of a model, with the states of its recurrent layers.

    `model.variables` leaves these out.
    """
    states = [la.states for _, la in walk(model) if isinstance(la, keras.layers.RNN)]
    return [*model.variables, *(v for v in keras.tree.flatten(states) if v is not None)]


def children(layer):
    """The layers that a layer or model holds itself, in Keras's order."""
    return layer._layers


@functools.cache
def functional_class():
    """The class of `keras.Model(inputs, outputs)`, which has no public name."""
    inputs = keras.Input((1,), name="inputs")
    return type(keras.Model(inputs, keras.layers.Identity(name="layer")(inputs)))


def graph_of(layer):
    """The graph of a layer: a Functional model, or None.

    A Sequential model has one if it is built and its input is a single tensor.
    """
    if isinstance(layer, keras.Sequential):
        return layer._functional
    return layer if isinstance(layer, functional_class()) else None


def scope(model):
    """The scope in which to make new variables of a model."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def scope_of_copies(model):
    """The scope in which to make copies of a model, and layers for them.

    In the scope of several processes, a variable waits for all of them. One of them may
    make a copy alone, and then it belongs to the present strategy, as `clone_model` has
    it.
    """
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if is_of_workers(strategy) else scope(model)


def is_of_workers(strategy):
    """Whether a value is a strategy of one process for each worker."""
    if not hasattr(type(strategy), "cluster_resolver"):
        return False
    from keras_bn.backends.tensorflow import context

    return context.is_of_workers(strategy)


def count_workers(model):
    """How many processes have a model together."""
    strategy: Any = getattr(model, "distribute_strategy", None)
    if not is_of_workers(strategy):
        return 1
    jobs = strategy.cluster_resolver.cluster_spec().as_dict()
    return max(1, sum(map(len, jobs.values())))


def nodes(graph):
    """The calls of a Functional model's graph, each after those it depends on.

    Args:
        graph: a Functional model.

    Returns:
        A list of Keras nodes, with `operation`, `arguments`, `input_tensors` and
        `outputs`, without the nodes of the model's inputs.
    """
    by_depth = graph._nodes_by_depth
    calls = [n for depth in sorted(by_depth, reverse=True) for n in by_depth[depth]]
    return [n for n in calls if n.operation and not n.is_input]


def input_of(node):
    """The main input of a call: its first argument, or the one called `inputs`."""
    arguments = node.arguments
    return arguments.args[0] if arguments.args else arguments.kwargs["inputs"]
