"""Whether a change of a model's graphs did what it promised.

`exchange`, `bypass` and `insert` change lists, trackers and graphs of Keras's that are
private. These checks look at the result, by other names than the change was made by, so
that a model that is half changed is an error and not a wrong number later.
"""

from keras_bn.surgery.graph import children, graph_of, nodes
from keras_bn.surgery.private import map_graph


class BrokenPromiseError(RuntimeError):
    """A change of a model that did not do what it promised."""


def exchanged(pairs, holders):
    """Check that each layer was replaced, wherever a layer or model held it.

    Args:
        pairs: of an old layer and its replacement.
        holders: the layers and models that were changed.

    Raises:
        BrokenPromiseError: if not.
    """
    present = _present(holders)
    for old, new in pairs:
        if id(old) in present:
            _broken(f"'{old.name}' is still in the model beside its replacement")
        if id(new) not in present:
            _broken(f"'{old.name}' was to be replaced, and nothing holds it")


def bypassed(holders, layers):
    """Check that a model is whole without layers that were taken out.

    Args:
        holders: the layers and models that held them.
        layers: the layers.

    Raises:
        BrokenPromiseError: if not.
    """
    present = _present(holders)
    for layer in layers:
        if id(layer) in present:
            _broken(f"'{layer.name}' was to be taken out, and is still in the model")


def inserted(holders, places):
    """Check that a model is whole, and holds and calls what was inserted.

    Args:
        holders: the layers and models in it.
        places: as in `insert`.

    Raises:
        BrokenPromiseError: if not.
    """
    present = _present(holders)
    for tensor, layers in places:
        for layer in layers:
            if id(layer) not in present:
                _broken(f"'{layer.name}' was to be inserted behind '{tensor.name}'")


def reachable(graph):
    """Check that all outputs of a graph come from its inputs, by its calls alone.

    Raises:
        BrokenPromiseError: if not.
    """
    try:
        calls, _, _, _ = map_graph(graph.inputs, graph.outputs)
    except ValueError as error:
        _broken(f"an output of '{graph.name}' cannot be reached: {error}")
    if calls != graph._nodes:
        _broken(f"the calls in '{graph.name}' are not those that its outputs need")


def _present(holders):
    """The `id` of every layer that is held or called, where all graphs are whole."""
    present = {id(layer) for holder in holders for layer in children(holder)}
    for graph in holders:
        if graph_of(graph) is graph:
            reachable(graph)
            present |= {id(node.operation) for node in nodes(graph)}
    return present


def _broken(reason):
    raise BrokenPromiseError(
        f"{reason[0].upper()}{reason[1:]}. This is a fault in keras_bn: please report "
        "it with the model. Your model has not changed."
    )
