"""What a tool knows of a model: layers by path, calls, who makes and reads a tensor."""

import functools
from collections import Counter, defaultdict

from keras_bn.surgery.graph import children, graph_of, nodes, walk
from keras_bn.surgery.norms import check_built, check_layer, is_normalization


class ModelView:
    """The layers and calls of a model, read once.

    A tool makes one and hands it down. It shows the model as it was then: after a
    change to the model's graphs, make another.

    Args:
        model: a Keras layer or model.

    Attributes:
        model: the same.
        layers: a list of `(path, layer)`, each layer once, in Keras's order. The model
            comes first, under its own name.
        graphs: the Functional models in it, each once.
        calls: the nodes of these graphs, each once, and after those that it depends on;
            those in a model come before the first call of that model.

    Raises:
        TypeError: if `model` is not a Keras layer or model.
    """

    def __init__(self, model):
        check_layer(model)
        self.model = model
        self.layers = [(path or layer.name, layer) for path, layer in walk(model)]
        self._paths = {id(layer): path for path, layer in self.layers}
        graphs = [graph_of(layer) for _, layer in self.layers]
        unique = {id(graph): graph for graph in graphs if graph is not None}
        self.graphs = list(unique.values())
        # A tensor may be in two graphs, as in a model and a part made of its tensors.
        calls = {id(node): node for graph in self.graphs for node in _within(graph)}
        self.calls = list(calls.values())
        self._outputs = {id(t) for graph in self.graphs for t in graph.outputs}
        self._producers = {id(t): node for node in self.calls for t in node.outputs}
        self._consumers = defaultdict(list)
        for node in self.calls:
            for key in dict.fromkeys(map(id, node.input_tensors)):
                self._consumers[key].append(node)
        self._places = Counter(id(node.operation) for node in self.calls)
        for (_, layer), graph in zip(self.layers, graphs, strict=True):
            if graph is None:  # it may call what it holds
                self._places.update(id(child) for child in children(layer))

    @property
    def graph(self):
        """The graph of the model itself, or None."""
        return graph_of(self.model)

    @functools.cached_property
    def normalizations(self):
        """The batch normalizations, ours and Keras's, by path."""
        return {path: la for path, la in self.layers if is_normalization(la)}

    @property
    def holders(self):
        """All that holds layers or calls: the layers, and the graphs of Sequentials."""
        graphs = [graph for graph in self.graphs if id(graph) not in self._paths]
        return [*(layer for _, layer in self.layers), *graphs]

    def path(self, operation):
        """The path of a layer; None for an operation that is no layer."""
        return self._paths.get(id(operation))

    def of_type(self, kind):
        """The layers of a class, by path."""
        return {path: layer for path, layer in self.layers if isinstance(layer, kind)}

    def check_built(self):
        """Refuse a model, or a normalization in it, that is not built.

        Raises:
            ValueError: naming what is not.
        """
        check_built(self.model, self.layers)

    def places(self, operation):
        """In how many places an operation is called, or held by what may call it."""
        return self._places[id(operation)]

    def called_once(self, operation):
        """Whether it is called in one place only."""
        return self.places(operation) == 1

    def producer(self, tensor):
        """The call that makes a tensor; None for an input of the model."""
        return self._producers.get(id(tensor))

    def consumers(self, tensor):
        """The calls that take a tensor."""
        return self._consumers.get(id(tensor), [])

    def is_output(self, tensor):
        """Whether a tensor is an output of the model or of one in it."""
        return id(tensor) in self._outputs

    def next(self, node):
        """The one call that takes the output of a call; None for none or several."""
        if len(node.outputs) != 1 or self.is_output(node.outputs[0]):
            return None
        consumers = self.consumers(node.outputs[0])
        return consumers[0] if len(consumers) == 1 else None


def _within(graph):
    """The calls of a graph and of the models in it, in calling order."""
    for node in nodes(graph):
        inner = graph_of(node.operation)
        if inner is not None:
            yield from _within(inner)
        yield node
