"""Replacing layers in a model in place, with what that takes in Keras's graph.

All nodes, tensors, lists and trackers stay; layers in them are replaced, and what
depends on the `id` of an object is updated.
"""

import collections
import gc
import operator
from typing import Any

import keras

from keras_bn.layer import traces
from keras_bn.surgery import promises
from keras_bn.surgery.graph import input_of, nodes, walk
from keras_bn.surgery.private import make_node_key, map_graph


def exchange(pairs, holders):
    """Replace layers in everything that holds or calls them.

    All other layers, calls and tensors stay the same objects.

    Args:
        pairs: of an old layer and its replacement.
        holders: the layers and models to change.

    Raises:
        BrokenPromiseError: if one was not replaced; then none is.
    """
    pairs = list(pairs)
    _exchange(pairs, holders)
    try:
        promises.exchanged(pairs, holders)
    except promises.BrokenPromiseError:
        _exchange([(new, old) for old, new in pairs], holders)
        raise


def exchange_alive(pairs):
    """Replace layers in all of memory; models that hold them compile their steps again.

    Args:
        pairs: as in `exchange`.

    Raises:
        BrokenPromiseError: as `exchange`.
    """
    exchange(pairs, _holders_alive([old for old, _ in pairs]))
    for model in _models_alive([new for _, new in pairs]):
        traces.renew(model)


def _exchange(pairs, holders):
    for old, new in pairs:
        new._inbound_nodes = old._inbound_nodes
        new._outbound_nodes = old._outbound_nodes
        for node in new._inbound_nodes:
            node.operation = new
            for tensor in node.outputs:
                if hasattr(tensor, "_keras_history"):
                    history = tensor._keras_history
                    tensor._keras_history = history._replace(operation=new)
    others = {id(old): new for old, new in pairs}
    for holder in holders:
        replace(holder, others)


def bypass(view, layers, others=None):
    """Take layers out of the graphs of a model, and those that nothing needs then.

    Args:
        view: the `ModelView` of a model, which is changed in place.
        layers: layers of one input and one output, each called once in some graph.
            Whatever takes the output of one then takes its input.
        others: the tensors that are taken instead of further tensors, by their `id`.

    Raises:
        BrokenPromiseError: if one is still in the model, or an output is cut off.
    """
    ids = {id(layer): GONE for layer in layers}
    before = _operations(view)
    for graph in view.graphs:
        instead: dict = {}
        for node in nodes(graph):
            output = id(node.outputs[0])
            if others and output in others:
                source = others[output]
            elif id(node.operation) in ids:
                source = input_of(node)
            else:
                continue
            instead[output] = instead.get(id(source), source)
        if not instead:
            continue
        for node in nodes(graph):
            if id(node.operation) not in ids:
                _take_other_inputs(node, instead)
        replace(graph, instead)
        redraw(graph)
        graph.output_names = [t._keras_history.operation.name for t in graph.outputs]
    after = _operations(view)
    fallen = [op for key, op in before.items() if key not in after]
    ids |= {id(op): GONE for op in fallen if view.called_once(op)}
    for operation in after.values():
        users = operation._outbound_nodes
        users[:] = [node for node in users if id(node.operation) not in ids]
    for holder in view.holders:
        replace(holder, ids)
    promises.bypassed(view.holders, layers)


def _operations(view):
    """What the graphs of a model call, by `id`."""
    return {id(op): op for graph in view.graphs for op in graph._operations}


def redraw(graph):
    """Note what a Functional model calls now, between its inputs and outputs."""
    graph._nodes, graph._nodes_by_depth, graph._operations, by_depth = map_graph(
        graph.inputs, graph.outputs
    )
    graph._operations_by_depth = by_depth


def _take_other_inputs(node, instead):
    """Give a call other input tensors, and note it in the layers that make them."""
    for tensor in node.input_tensors:
        if id(tensor) in instead:
            maker = instead[id(tensor)]._keras_history.operation
            maker._outbound_nodes.append(node)
    replace(node.arguments, instead)


def detach(layers):
    """Let layers forget their calls, which are other layers' now."""
    for layer in layers:
        layer._inbound_nodes, layer._outbound_nodes = [], []


def _holders_alive(layers):
    """All Keras layers and models in memory that hold one of some layers."""
    wanted = {id(layer) for layer in layers}
    return [
        holder
        for holder in gc.get_objects()
        if issubclass(type(holder), keras.layers.Layer)
        and any(id(layer) in wanted for layer in vars(holder).get("_layers", ()))
    ]


def _models_alive(layers):
    """All built models in memory that hold one of some layers, to any depth."""
    wanted = {id(v) for layer in layers if layer.built for v in layer.variables}
    return [
        model
        for model in gc.get_objects()
        # Not isinstance(), which reads `__class__`: lazy modules then import.
        if issubclass(type(model), keras.Model)
        and getattr(model, "built", False)
        and any(id(variable) in wanted for variable in model.variables)
    ]


def replace(holder, others):
    """Replace objects in all attributes of an object.

    Lists and dicts change in place, to any depth.

    Args:
        holder: any object.
        others: dict from the `id` of an object to its replacement; `GONE` removes it.
    """
    seen = set()

    def replaced(value):
        if id(value) in others:
            return others[id(value)]
        kind = type(value)
        if is_wrapped(value):
            before = _flat(value.__wrapped__)
            inner = replaced(value.__wrapped__)
            after = _flat(inner)
            same = len(before) == len(after) and all(map(operator.is_, before, after))
            return value if same else kind(inner)
        if issubclass(kind, tuple):
            parts = [replaced(part) for part in value]
            if all(map(operator.is_, parts, value)):
                return value
            if any(part is GONE for part in parts):
                return GONE
            return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
        if id(value) in seen:
            return value
        seen.add(id(value))
        if issubclass(kind, list):
            parts = [replaced(part) for part in list.__iter__(value)]
            parts = [part for part in parts if part is not GONE]
            list.__setitem__(value, slice(None), parts)
            if kind.__module__ == _TENSORFLOWS:
                # TensorFlow's list keeps a second copy, and what to save of it.
                replace(value, others)
        elif issubclass(kind, dict):
            for key, part in list(dict.items(value)):
                new_key, new = others.get(id(key), key), replaced(part)
                base = plain_dict(kind)
                if new_key is not key or new is GONE:
                    base.pop(value, key)
                if new_key is not GONE and new is not GONE:
                    base.__setitem__(value, new_key, new)
        return value

    for name, value in list(vars(holder).items()):
        new = replaced(value)
        if new is not GONE:
            vars(holder)[name] = new
    if tracker := vars(holder).get("_tracker"):
        for _, items in tracker.config.values():
            replaced(items)
        retrack(tracker)
    if hasattr(holder, "_nodes_by_depth"):
        note_nodes(holder)
    if isinstance(holder, keras.layers.Layer):
        refresh_parameters(holder)


class GONE:
    """Stands for an object to remove."""


_TENSORFLOWS = "tensorflow.python.trackable.data_structures"


def _flat(value):
    """The keys and values of a dict, or the parts of a tuple, in a list."""
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def plain_dict(kind: Any) -> Any:
    """The plain class whose methods change a dict of a kind, unseen by any tracking.

    An `OrderedDict` has its order beside the dict that it is.
    """
    ordered = issubclass(kind, collections.OrderedDict)
    return collections.OrderedDict if ordered else dict


def is_wrapped(value):
    """Whether a value is a dict or tuple in TensorFlow's tracking wrapper.

    By type(), since `isinstance` takes the wrapper for its content.
    """
    kind = type(value)
    return kind.__module__ == _TENSORFLOWS and not issubclass(kind, list)


def retrack(tracker):
    """Tell a Keras tracker what its lists hold now."""
    for name, (_, items) in tracker.config.items():
        tracker.stored_ids[name] = {id(item) for item in items}


def refresh_parameters(layer):
    """Refresh the parameter list of the PyTorch module behind a Keras layer."""
    if hasattr(layer, "_torch_params"):
        layer._track_variables()


def note_nodes(graph):
    """Give a Functional model the present keys of the calls in its graph."""
    graph._nodes = {
        make_node_key(node.operation, node.operation._inbound_nodes.index(node))
        for calls in graph._nodes_by_depth.values()
        for node in calls
    }


def optimizers(model):
    """The optimizers in the attributes of a model's layers, to any depth."""
    waiting = [v for _, layer in walk(model) for v in vars(layer).values()]
    optimizers = {}
    while waiting:
        value = waiting.pop()
        if (
            isinstance(value, keras.optimizers.Optimizer)
            and id(value) not in optimizers
        ):
            optimizers[id(value)] = value
            waiting += vars(value).values()
    return list(optimizers.values())


def trained_by(optimizer):
    """The variables that a built optimizer has state for."""
    return optimizer._trainable_variables


def rekey(optimizer, pairs):
    """Give an optimizer the keys of other variables.

    Args:
        optimizer: a Keras optimizer.
        pairs: of a variable that it knew, and the one that it has instead.
    """
    keys = {optimizer._var_key(v): optimizer._var_key(w) for v, w in pairs}
    for value in vars(optimizer).values():
        value = getattr(value, "__wrapped__", value)  # TensorFlow wraps dicts
        if issubclass(type(value), dict):
            for key in [k for k in value if isinstance(k, str | int) and k in keys]:
                dict.__setitem__(value, keys[key], dict.pop(value, key))
        elif issubclass(type(value), set):
            known = {v for v in value if isinstance(v, str | int) and v in keys}
            set.difference_update(value, known)
            set.update(value, {keys[v] for v in known})
