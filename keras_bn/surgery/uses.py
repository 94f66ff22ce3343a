"""Who uses the outputs of a model's layers."""

from collections import Counter

from keras_bn.surgery.graph import children, graph_of, graphs, nodes, walk


class Uses:
    """The calls of a model and the layers that take their outputs.

    Args:
        model: a Functional or Sequential model.

    Attributes:
        nodes: the calls in all its graphs, each after those it depends on.
    """

    def __init__(self, model):
        self._drawn = [(graph, nodes(graph)) for graph in graphs(model)]
        self.nodes = [node for _, calls in self._drawn for node in calls]
        self._outputs = {id(t) for graph, _ in self._drawn for t in graph.outputs}
        self._calls = Counter(id(node.operation) for node in self.nodes)
        for _, holder in walk(model):
            if graph_of(holder) is None:
                self._calls.update(id(layer) for layer in children(holder))

    def once(self, operation):
        """Whether it is called in one place only."""
        return self._calls[id(operation)] == 1

    def consumers(self, tensor):
        """The calls that take a tensor."""
        return [
            node
            for node in self.nodes
            if any(each is tensor for each in node.input_tensors)
        ]

    def is_output(self, tensor):
        """Whether a tensor is an output of the model or of one in it."""
        return id(tensor) in self._outputs

    def next(self, node):
        """The one call that takes the output of a call; None for none or several."""
        if len(node.outputs) != 1 or self.is_output(node.outputs[0]):
            return None
        consumers = self.consumers(node.outputs[0])
        return consumers[0] if len(consumers) == 1 else None
