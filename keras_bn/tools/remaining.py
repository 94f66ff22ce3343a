"""The calls of a model as they will be, without those that folding takes out."""

from collections import Counter

import keras

from keras_bn.surgery.graph import functional_class, graph_of, input_of, nodes
from keras_bn.surgery.norms import is_normalization


class Remaining:
    """The calls of a model without those of normalizations that are folded.

    Args:
        view: the `ModelView` of the model.
        inside: whether a tensor that goes into a model in it, or comes out of that, is
            the same on both sides. It is so for models of one input and one output that
            are called once.
    """

    def __init__(self, view, inside):
        self._view = view
        self._sources: dict[int, object] = {}
        # The tensors that one replaces, by its `id`.
        self._replaced: dict[int, list] = {}
        self._outputs = Counter(id(t) for graph in view.graphs for t in graph.outputs)
        holders = Counter(id(t) for graph in view.graphs for t in graph.inputs)
        for node in view.calls if inside else ():
            if (graph := _seen_through(view, node)) is None:
                continue
            given, wanted = input_of(node), graph.inputs[0]
            # A part of a model may have the same input, and be called on it or not.
            if given is not wanted and holders[id(wanted)] > 1:
                continue
            self._outputs[id(graph.outputs[0])] -= 1
            self.replace(node.outputs[0], graph.outputs[0])
            if given is not wanted:
                self.replace(wanted, given)

    def replace(self, tensor, other):
        """Let whatever takes a tensor take another."""
        source = self.source(other)
        tensors = [tensor, *self._replaced.pop(id(tensor), [])]
        self._sources[id(tensor)] = source
        self._replaced.setdefault(id(source), []).extend(tensors)

    def drop(self, tensor):
        """Take out the calls that make a tensor, as far as nothing takes theirs."""
        while not self.consumers(tensor) and not self.is_output(tensor):
            node = self.producer(tensor)
            tensor = input_of(node)
            self.replace(node.outputs[0], tensor)

    def source(self, tensor):
        """The tensor that replaces this one, now that some calls are out."""
        while id(tensor) in self._sources:
            tensor = self._sources[id(tensor)]
        return tensor

    def producer(self, tensor):
        """The call that makes a tensor; None for an input of the model."""
        return self._view.producer(self.source(tensor))

    def _same(self, tensor):
        source = self.source(tensor)
        return [source, *self._replaced.get(id(source), [])]

    def consumers(self, tensor):
        """The calls still there that take a tensor."""
        calls = {
            id(node): node  # it may take several tensors that are now the same
            for same in self._same(tensor)
            for node in self._view.consumers(same)
            if self.is_there(node)
        }
        return list(calls.values())

    def is_there(self, node):
        """Whether a call is not taken out."""
        return id(node.outputs[0]) not in self._sources

    def is_output(self, tensor):
        """Whether a tensor is an output of the model, or of a part of it alone."""
        return any(self._outputs[id(same)] for same in self._same(tensor))


def _seen_through(view, node):
    """The graph of a model whose calls might as well stand in the place of its own."""
    model, graph = node.operation, graph_of(node.operation)
    if graph is None or len(graph.inputs) != 1 or len(graph.outputs) != 1:
        return None
    if type(model).call not in (functional_class().call, keras.Sequential.call):
        return None
    given, wanted = input_of(node), graph.inputs[0]
    same = isinstance(given, keras.KerasTensor) and given.dtype == wanted.dtype
    if not same or len(given.shape) != len(wanted.shape):
        return None
    # Something has to be left in it.
    left = any(not is_normalization(each.operation) for each in nodes(graph))
    training = node.arguments.kwargs.get("training")
    return graph if left and not training and view.called_once(model) else None
