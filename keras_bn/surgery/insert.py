"""Putting further layers behind others in the graphs of a model, in place."""

from keras_bn.surgery.exchange import note_nodes, replace
from keras_bn.surgery.graph import graph_of, nodes, walk
from keras_bn.surgery.private import map_graph


def insert(model, places):
    """Put layers behind tensors, so that all that takes a tensor takes their output.

    Args:
        model: a Functional or Sequential model, changed in place.
        places: a list of `(tensor, layers)`: a tensor of one of its graphs, and the
            layers to call on it, in order.
    """
    behind = {id(tensor): (tensor, made) for tensor, made in places}
    for _, holder in walk(model):
        graph = graph_of(holder)
        if graph is None:
            continue
        here = [t for n in nodes(graph) for t in n.outputs] + list(graph.inputs)
        found = [behind[id(t)] for t in here if id(t) in behind]
        for tensor, made in found:
            _insert(graph, tensor, made)
        if found:
            _redraw(holder, graph, [layer for _, made in found for layer in made])


def _insert(graph, tensor, made):
    consumers = [
        node
        for node in nodes(graph)
        if any(each is tensor for each in node.input_tensors)
    ]
    new = tensor
    for layer in made:
        new = layer(new)
    maker = tensor._keras_history.operation
    moved = {id(node) for node in consumers}
    users = maker._outbound_nodes
    users[:] = [node for node in users if id(node) not in moved]
    for node in consumers:
        replace(node.arguments, {id(tensor): new})
        new._keras_history.operation._outbound_nodes.append(node)
    if not any(tensor is each for each in graph.inputs):
        replace(graph, {id(tensor): new})


def _redraw(holder, graph, made):
    """Note the new layers in a model and in its graph."""
    graph._nodes, graph._nodes_by_depth, graph._operations, by_depth = map_graph(
        graph._inputs, graph._outputs
    )
    graph._operations_by_depth = by_depth
    note_nodes(graph)
    for each in {id(holder): holder, id(graph): graph}.values():
        for layer in made:
            each._tracker.track(layer)
        # In the order of the graph, as the layers, and so the weights, of a clone are.
        inside = {id(layer) for layer in graph.layers}
        others = [layer for layer in each._layers if id(layer) not in inside]
        layers = [*graph.layers, *others]
        _, tracked = each._tracker.config["layers"]
        list.__setitem__(tracked, slice(None), layers)
        if each._layers is not tracked:  # Functional, up to Keras 3.12
            each._layers = layers
