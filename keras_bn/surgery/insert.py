"""Putting further layers behind others in the graphs of a model, in place."""

from keras_bn.surgery import promises
from keras_bn.surgery.exchange import redraw, replace
from keras_bn.surgery.graph import graph_of, nodes


def insert(view, places):
    """Put layers behind tensors, so that all that takes a tensor takes their output.

    Args:
        view: the `ModelView` of a Functional or Sequential model, which is changed in
            place.
        places: a list of `(tensor, layers)`: a tensor of one of its graphs, and the
            layers to call on it, in order.

    Raises:
        BrokenPromiseError: if one is not in the model then, or an output is cut off.
    """
    behind = {id(tensor): (tensor, layers) for tensor, layers in places}
    for _, holder in view.layers:
        graph = graph_of(holder)
        if graph is None:
            continue
        tensors = [t for n in nodes(graph) for t in n.outputs] + list(graph.inputs)
        here = [behind[id(t)] for t in tensors if id(t) in behind]
        for tensor, layers in here:
            _insert(graph, tensor, layers, view.consumers(tensor))
        if here:
            _note(holder, graph, [layer for _, layers in here for layer in layers])
    promises.inserted(view.holders, places)


def _insert(graph, tensor, layers, consumers):
    new = tensor
    for layer in layers:
        new = layer(new)
    maker = tensor._keras_history.operation
    moved = {id(node) for node in consumers}
    users = maker._outbound_nodes
    users[:] = [node for node in users if id(node) not in moved]
    for node in consumers:
        replace(node.arguments, {id(tensor): new})
        new._keras_history.operation._outbound_nodes.append(node)
    if not any(tensor is other for other in graph.inputs):
        replace(graph, {id(tensor): new})


def _note(holder, graph, layers):
    """Note the new layers in a model and in its graph."""
    redraw(graph)
    for model in {id(holder): holder, id(graph): graph}.values():
        for layer in layers:
            model._tracker.track(layer)
        # In the order of the graph, as the layers, and so the weights, of a clone are.
        inside = {id(layer) for layer in graph.layers}
        others = [layer for layer in model._layers if id(layer) not in inside]
        ordered = [*graph.layers, *others]
        _, tracked = model._tracker.config["layers"]
        list.__setitem__(tracked, slice(None), ordered)
        if model._layers is not tracked:  # Functional, up to Keras 3.12
            model._layers = ordered
