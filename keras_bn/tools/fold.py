"""Folding batch normalizations into the layers next to them, for inference."""

from typing import NamedTuple

import keras

from keras_bn.pages.display import Content, Displayed
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.exchange import bypass, exchange
from keras_bn.surgery.graph import (
    children,
    graph_of,
    graphs,
    holders,
    input_of,
    nodes,
    scope,
    walk,
)
from keras_bn.surgery.norms import (
    check_built,
    computes_otherwise,
    is_normalization,
    is_ours,
    plain,
    rounds,
)
from keras_bn.surgery.private import require
from keras_bn.surgery.rebuild import rebuild
from keras_bn.tools.fuse import has_own_call, separate
from keras_bn.tools.linear import (
    Linear,
    Normalization,
    UnfoldableError,
    is_activated,
    is_linear,
    linear,
)


class Fold(NamedTuple):
    """What folding does to one batch normalization.

    Args:
        layer: its path in the model.
        into: the path of the layer that it is folded into; None if it stays.
        reason: why it stays, naming the layers; empty if it is folded.
    """

    layer: str
    into: str | None
    reason: str = ""

    def __str__(self) -> str:
        if self.into is None:
            return f"{self.layer} stays: {self.reason}"
        return f"{self.layer} -> {self.into}"


class Folds(Displayed, list[Fold]):
    """A list of `Fold`: `print` shows one a line, a notebook shows a table.

    Args:
        folds: the `Fold` of each normalization.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def _content(self):
        folded = sum(each.into is not None for each in self)
        title = f"{folded} of {len(self)} can be folded"
        return Content(title, "folds.html", {"title": title, "folds": self})


def plan_fold(model: keras.Model) -> Folds:
    """What `fold` would do to each batch normalization of a model, ours or Keras's.

    Args:
        model: a built model.

    Returns:
        A list of `Fold`, one for each batch normalization; `print` shows one a line, a
        notebook shows a table.

    Example:

    >>> import keras, keras_bn
    >>> model = keras.Sequential([
    ...     keras.Input((4,)),
    ...     keras.layers.Dense(3, name="dense"),
    ...     keras_bn.BatchNormalization(name="bn_1"),
    ...     keras.layers.ReLU(name="relu"),
    ...     keras_bn.BatchNormalization(name="bn_2"),
    ... ])
    >>> print(keras_bn.plan_fold(model))
    bn_1 -> dense
    bn_2 stays: 'relu' before it is not linear; it is an output of the model
    """
    require("keras_bn.plan_fold", "layers", "graph")
    return Plan(model).folds


def fold(model: keras.Model) -> keras.Model:
    """A model for inference, with batch normalizations folded into other layers.

    In inference a batch normalization is a scale and a shift per channel. They go into
    the weights of the layer before it, if that is linear and nothing else takes its
    output; otherwise, where that is exact, into the linear layer after it. Linear are
    Dense, EinsumDense, convolutions, their transposes, depthwise and separable
    convolutions, and other batch normalizations. The arithmetic is in float64; the
    weights keep their dtype. `plan_fold` says which normalizations stay, and why.

    Args:
        model: a built model, which does not change.

    Returns:
        A new model of the same class with the outputs of the given one in inference.
        It is not compiled, and not meant for training.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: for a model that is not built, and layers that cannot be copied.

    Example:

    >>> import keras, keras_bn
    >>> model = keras.Sequential([
    ...     keras.Input((4,)), keras.layers.Dense(3), keras_bn.BatchNormalization()
    ... ])
    >>> [type(layer).__name__ for layer in keras_bn.fold(model).layers]
    ['Dense']
    """
    require("keras_bn.fold", "layers", "graph", "copy")
    return Plan(model).folded_model()


class Fused(NamedTuple):
    """A normalization that is computed as one with the linear layer before it.

    Args:
        norm: the normalization.
        linear: the `Linear` of the layer before it.
        axes: the channel axes between them.
    """

    norm: keras.layers.Layer
    linear: Linear
    axes: tuple[int, ...]


class Plan:
    """Which normalization goes into which layer, graph by graph in calling order.

    `plan_fold` returns `folds`; `fold` returns `folded_model()`. `folded` holds the
    layers to remove, `edits` the `Linear` of each layer that changes, both by the `id`
    of the layer.

    Args:
        model: a built model.
        fusing: whether to plan for `freeze(model, fuse=True)` instead: normalizations
            of ours alone, and only into a linear layer before them. `fused` then holds
            a `Fused` for each.
    """

    def __init__(self, model, fusing=False):
        check_built(model)
        self._model, self._fusing = model, fusing
        self.fused: list[Fused] = []
        self.folded: dict[int, keras.layers.Layer] = {}
        self.edits: dict[int, Linear] = {}
        self._paths = {id(layer): path for path, layer in walk(model)}
        drawn = [_Graph(graph) for graph in graphs(model)]
        self._calls = _count_calls(drawn, model)
        found = {}
        for graph in drawn:
            for node in graph.nodes:
                norm = node.operation
                if self._concerns(norm) and id(norm) not in found:
                    found[id(norm)] = self._place(graph, node)
        self.folds = Folds()
        around = [layer for _, layer in walk(model) if rounds(layer)]
        within = {id(held) for layer in around for held in children(layer)}
        for path, layer in walk(model):
            if computes_otherwise(layer):
                self.folds.append(Fold(path or layer.name, None, _OTHERWISE))
            elif self._concerns(layer):
                reason = _WITHIN if id(layer) in within else _OUTSIDE
                outside = Fold(path or layer.name, None, reason)
                self.folds.append(found.get(id(layer)) or outside)

    def _concerns(self, layer):
        return is_ours(layer) if self._fusing else is_normalization(layer)

    def folded_model(self):
        """A new model as planned."""
        copy, of = copy_model(self._model, compiled=False)
        separate(copy)
        pairs = []
        with scope(copy):
            for edit in self.edits.values():
                layer = of(edit.layer)
                if isinstance(edit, Normalization):
                    whole = rebuild(layer, plain(layer), center=True, scale=True)
                    pairs.append((layer, whole))
                    layer = whole
                edit.write(layer)
        exchange(pairs, holders(copy))
        bypass(copy, [of(layer) for layer in self.folded.values()])
        return copy

    def _place(self, graph, node):
        norm = node.operation
        path = self._paths[id(norm)]
        try:
            self._check_alone(norm)
            if node.arguments.kwargs.get("training"):
                raise UnfoldableError("is called with `training`")
            rank = len(node.outputs[0].shape)
            inner = Normalization(norm, rank)
        except UnfoldableError as reason:
            return Fold(path, None, f"it {reason}")
        reasons = []
        for place in (self._before,) if self._fusing else (self._before, self._after):
            try:
                target = place(graph, node, self.edits.get(id(norm), inner))
            except UnfoldableError as reason:
                reasons.append(str(reason))
                continue
            self.edits.pop(id(norm), None)
            self.folded[id(norm)] = norm
            if self._fusing:
                self.fused.append(Fused(norm, self.edits[id(target)], inner.axes))
            graph.bypass(node)
            return Fold(path, self._paths[id(target)])
        return Fold(path, None, "; ".join(reasons))

    def _before(self, graph, node, norm):
        """Fold into the layer before; returns it."""
        tensor = graph.source(input_of(node))
        producer = graph.producer(tensor)
        if producer is None:
            raise UnfoldableError("it takes an input of the model")
        target = producer.operation
        self._check_target(target, norm, "before")
        self._check_alone(target, f"'{target.name}' ")
        if is_activated(target):
            name = getattr(target.activation, "__name__", target.activation)
            raise UnfoldableError(
                f"'{target.name}' before it has the activation {name}"
            )
        others = [n for n in graph.consumers(tensor) if n is not node]
        if others:
            raise UnfoldableError(
                f"'{others[0].operation.name}' also uses the output of '{target.name}'"
            )
        if graph.is_output(tensor):
            raise UnfoldableError(
                f"'{target.name}' before it is an output of the model"
            )
        self._take(target, "fold_output", norm, len(input_of(producer).shape))
        return target

    def _after(self, graph, node, norm):
        """Fold into the layer after; returns it."""
        if graph.is_output(node.outputs[0]):
            raise UnfoldableError("it is an output of the model")
        consumers = graph.consumers(node.outputs[0])
        names = sorted(f"'{n.operation.name}'" for n in consumers)
        if len(consumers) != 1:
            raise UnfoldableError(f"{' and '.join(names) or 'nothing'} use its output")
        target = consumers[0].operation
        self._check_target(target, norm, "after")
        self._check_alone(target, f"'{target.name}' ")
        if is_normalization(target) and consumers[0].arguments.kwargs.get("training"):
            raise UnfoldableError(f"'{target.name}' is called with `training`")
        self._take(target, "fold_input", norm, norm.rank)
        return target

    def _check_target(self, target, norm, where):
        name = f"'{target.name}'"
        if not is_linear(target):
            raise UnfoldableError(f"{name} {where} it is not linear")
        if self._fusing and is_normalization(target):
            raise UnfoldableError(f"{name} {where} it is a batch normalization")
        if self._fusing and has_own_call(target):
            raise UnfoldableError(f"{name} {where} it has a `call` set on it")
        if target.quantization_mode is not None or getattr(
            target, "lora_enabled", False
        ):
            raise UnfoldableError(f"{name} {where} it is quantized or has LoRA weights")
        if target.compute_dtype != norm.layer.compute_dtype:
            raise UnfoldableError(
                f"{name} {where} it computes in {target.compute_dtype}, not in "
                f"{norm.layer.compute_dtype}"
            )

    def _check_alone(self, layer, name=""):
        calls = self._calls.get(id(layer), 0)
        if calls != 1:
            raise UnfoldableError(f"{name}is shared: it is called in {calls} places")

    def _take(self, target, side, norm, rank):
        edit = self.edits.get(id(target)) or linear(target, rank)
        try:
            getattr(edit, side)(norm.affine, norm.axes)
        except UnfoldableError as reason:
            raise UnfoldableError(f"'{target.name}' {reason}") from None
        self.edits[id(target)] = edit


_OUTSIDE = "it is an attribute of a layer, and only graphs show what is next to it"
_WITHIN = "it is folded already, by the layer of `quantize_aware` around it"
_OTHERWISE = "its class has a `call` of its own, so what it computes is not known"


class _Graph:
    """The calls of a graph without the normalizations that are folded."""

    def __init__(self, graph):
        self.nodes = nodes(graph)
        self._producers = {id(t): n for n in self.nodes for t in n.outputs}
        self._outputs = {id(t) for t in graph.outputs}
        self._sources: dict[int, object] = {}

    def bypass(self, node):
        """Take out a node, so that its input replaces its output."""
        self._sources[id(node.outputs[0])] = input_of(node)

    def source(self, tensor):
        """The tensor that replaces this one, now that some nodes are out."""
        while id(tensor) in self._sources:
            tensor = self._sources[id(tensor)]
        return tensor

    def producer(self, tensor):
        return self._producers.get(id(self.source(tensor)))

    def _same(self, tensor):
        """The `id`s of the tensors that the given one replaces, and its own."""
        source = self.source(tensor)
        out = {id(t): t for n in self.nodes for t in n.outputs}
        return {id(source)} | {k for k, t in out.items() if self.source(t) is source}

    def consumers(self, tensor):
        """The nodes still in the graph that take a tensor."""
        same = self._same(tensor)
        return [
            node
            for node in self.nodes
            if id(node.outputs[0]) not in self._sources
            and any(id(t) in same for t in node.input_tensors)
        ]

    def is_output(self, tensor):
        return bool(self._same(tensor) & self._outputs)


def _count_calls(drawn, model):
    """How often each layer is called, or held by a layer that may call it."""
    calls: dict[int, int] = {}
    for graph in drawn:
        for node in graph.nodes:
            key = id(node.operation)
            calls[key] = calls.get(key, 0) + 1
    for _, holder in walk(model):
        if graph_of(holder) is None:
            for layer in children(holder):
                calls[id(layer)] = calls.get(id(layer), 0) + 1
    return calls
