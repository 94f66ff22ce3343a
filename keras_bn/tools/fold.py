"""Folding batch normalizations into the layers next to them, for inference."""

from typing import NamedTuple

import keras

from keras_bn.pages.display import Content, Displayed
from keras_bn.pages.plain import escaped
from keras_bn.surgery.classes import as_graphs, warn_of_folded
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.exchange import bypass, exchange
from keras_bn.surgery.functional import opened
from keras_bn.surgery.graph import graph_of, input_of, scope
from keras_bn.surgery.norms import (
    MadeByTool,
    adapts,
    computes_otherwise,
    is_normalization,
    is_ours,
    plain,
)
from keras_bn.surgery.private import require
from keras_bn.surgery.rebuild import rebuild
from keras_bn.surgery.view import ModelView
from keras_bn.tools.commute import through
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
            return escaped(f"{self.layer} stays: {self.reason}")
        return escaped(f"{self.layer} -> {self.into}")


class Folds(Displayed, list[Fold]):
    """A list of `Fold`: `print` shows one a line, a notebook shows a table.

    Args:
        folds: the `Fold` of each normalization.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def _content(self):
        folded = sum(fold.into is not None for fold in self)
        title = f"{folded} of {len(self)} can be folded"
        return Content(title, "folds.html", {"title": title, "folds": self})


def plan_fold(model: keras.Model) -> Folds:
    """What `fold` would do to each batch normalization of a model.

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
    view = ModelView(model)
    view.check_built()
    with opened(view) as (graph, closed):
        return FoldPlan(graph, view, closed).folds


def fold(model: keras.Model) -> keras.Model:
    """A model for inference, with batch normalizations folded into other layers.

    In inference a batch normalization is a scale and a shift per channel. They go into
    the weights of the layer before it, if that is linear and nothing else takes its
    output; otherwise, where that is exact, into the linear layer after it. Linear are
    Dense, EinsumDense, convolutions, their transposes, depthwise and separable
    convolutions, and other batch normalizations. Between the two may be layers that a
    scale and a shift go through: dropout, noise, pooling, cropping, nearest upsampling,
    `Identity`, linear activations, `Flatten`, `Reshape` and `Permute`. The arithmetic
    is in float64; the weights keep their dtype. `plan_fold` says which normalizations
    stay, and why.

    Args:
        model: a built model, which does not change.

    Returns:
        A new model with the outputs of the given one in inference. It is not compiled,
        and not meant for training. Where something folds in a subclassed model, it is
        a Functional model of the shapes that the given one was built with. Where a
        class makes its own layers in its constructor, the result is a plain Functional
        or Sequential model instead, for its graph is no longer that of the class.

    Subclassed models, and layers of your own that hold layers, are opened as by
    `keras_bn.functional`; where that cannot be, they stay as they are, and `plan_fold`
    says why.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: for a model that is not built, and layers that cannot be copied.

    Warns:
        UserWarning: if something is folded in a layer that makes its own layers and is
            not opened, with its path: a file of the result does not load.

    Example:

    >>> import keras, keras_bn
    >>> model = keras.Sequential([
    ...     keras.Input((4,)), keras.layers.Dense(3), keras_bn.BatchNormalization()
    ... ])
    >>> [type(layer).__name__ for layer in keras_bn.fold(model).layers]
    ['Dense']
    """
    require("keras_bn.fold", "layers", "graph", "copy")
    view = ModelView(model)
    view.check_built()
    with opened(view) as (graph, closed):
        plan = FoldPlan(graph, view, closed)
        if plan.folded:
            warn_of_folded(graph, plan.folded.values(), stacklevel=2)
            return plan.folded_model()
    plan = FoldPlan(view)
    warn_of_folded(view, plan.folded.values(), stacklevel=2)
    return plan.folded_model()


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


class FoldPlan:
    """Which normalization goes into which layer, graph by graph in calling order.

    `plan_fold` returns `folds`; `fold` returns `folded_model()`. `folded` holds the
    layers to remove, `edits` the `Linear` of each layer that changes, both by the `id`
    of the layer. `forward` holds the paths of those that go into a later layer.

    Args:
        view: the `ModelView` of a built model.
        named: the view that has the paths, if it is not the same.
        closed: why layers are not open, by path, as `surgery.functional.opened` says.
        fusing: whether to plan for `freeze(model, fuse=True)` instead: `keras_bn`
            layers alone, and only into a linear layer directly before them. `fused`
            then holds a `Fused` for each.
    """

    def __init__(self, view, named=None, closed=None, fusing=False):
        named = named or view
        view.check_built()
        self._view, self._named, self._fusing = view, named, fusing
        self.fused: list[Fused] = []
        self.folded: dict[int, keras.layers.Layer] = {}
        self.edits: dict[int, Linear] = {}
        self.forward: set[str] = set()
        self._calls = _Remaining(view)
        folds: dict[int, Fold] = {}
        for node in view.calls:
            norm = node.operation
            if self._concerns(norm) and id(norm) not in folds:
                folds[id(norm)] = self._place(node)
        within = {
            id(layer.folded_normalization)
            for _, layer in named.layers
            if isinstance(layer, MadeByTool)
        }
        self.folds = Folds()
        for path, layer in named.layers:
            if computes_otherwise(layer):
                self.folds.append(Fold(path, None, _OTHERWISE))
            elif self._concerns(layer):
                outside = _outside(path, closed or {}, named.path(named.model))
                reason = _WITHIN if id(layer) in within else outside
                self.folds.append(folds.get(id(layer)) or Fold(path, None, reason))

    def _concerns(self, layer):
        return is_ours(layer) if self._fusing else is_normalization(layer)

    def folded_model(self):
        """A new model as planned."""
        copy, of = copy_model(self._view.model, compiled=False, view=self._view)
        view = ModelView(copy)
        separate(view)
        pairs = []
        with scope(copy):
            for edit in self.edits.values():
                layer = of(edit.layer)
                if isinstance(edit, Normalization):
                    whole = rebuild(layer, plain(layer), center=True, scale=True)
                    pairs.append((layer, whole))
                    layer = whole
                edit.write(layer)
        exchange(pairs, view.holders)
        bypass(view, [of(layer) for layer in self.folded.values()])
        if self.folded:
            as_graphs(view)
        return copy

    def _place(self, node):
        norm = node.operation
        path = self._named.path(norm)
        try:
            self._check_alone(norm)
            if node.arguments.kwargs.get("training"):
                raise UnfoldableError("is called with `training`")
            if adapts(norm):
                raise UnfoldableError("follows its inputs (`keras_bn.adapt`)")
            inner = Normalization(norm, len(node.outputs[0].shape))
        except UnfoldableError as reason:
            return Fold(path, None, f"it {reason}")
        edit = self.edits.get(id(norm), inner)
        reasons = []
        for place in (self._before,) if self._fusing else (self._before, self._after):
            try:
                target = place(node, edit)
            except UnfoldableError as reason:
                reasons.append(str(reason))
                continue
            self.edits.pop(id(norm), None)
            self.folded[id(norm)] = norm
            if self._fusing:
                self.fused.append(Fused(norm, self.edits[id(target)], inner.axes))
            if place == self._after:
                self.forward.add(path)
            self._calls.bypass(node)
            return Fold(path, self._named.path(target))
        return Fold(path, None, "; ".join(reasons))

    def _before(self, node, norm):
        """Fold into the linear layer before; returns it."""
        affine, axes = norm.affine, norm.axes
        while True:
            tensor = self._calls.source(input_of(node))
            producer = self._calls.producer(tensor)
            if producer is None:
                raise UnfoldableError("it takes an input of the model")
            target = producer.operation
            if is_linear(target):
                self._check_target(target, norm, "before")
                if is_activated(target):
                    name = getattr(target.activation, "__name__", target.activation)
                    raise UnfoldableError(
                        f"'{target.name}' before it has the activation {name}"
                    )
            else:
                affine, axes = self._through(producer, affine, axes, "before")
            others = [n for n in self._calls.consumers(tensor) if n is not node]
            if others:
                raise UnfoldableError(
                    f"'{others[0].operation.name}' also uses the output of "
                    f"'{target.name}'"
                )
            if self._calls.is_output(tensor):
                raise UnfoldableError(
                    f"'{target.name}' before it is an output of the model"
                )
            if is_linear(target):
                rank = len(input_of(producer).shape)
                self._take(target, "fold_output", affine, axes, rank)
                return target
            node = producer

    def _after(self, node, norm):
        """Fold into the linear layer after; returns it."""
        affine, axes = norm.affine, norm.axes
        name = "it"
        while True:
            tensor = node.outputs[0]
            if self._calls.is_output(tensor):
                raise UnfoldableError(f"{name} is an output of the model")
            consumers = self._calls.consumers(tensor)
            if len(consumers) != 1:
                names = sorted(f"'{n.operation.name}'" for n in consumers)
                whose = "its output" if name == "it" else f"the output of {name}"
                raise UnfoldableError(f"{' and '.join(names) or 'nothing'} use {whose}")
            (node,) = consumers
            target = node.operation
            name = f"'{target.name}'"
            if is_linear(target):
                self._check_target(target, norm, "after")
                if is_normalization(target) and node.arguments.kwargs.get("training"):
                    raise UnfoldableError(f"{name} is called with `training`")
                rank = len(input_of(node).shape)
                self._take(target, "fold_input", affine, axes, rank)
                return target
            affine, axes = self._through(node, affine, axes, "after")

    def _through(self, node, affine, axes, where):
        """What a layer with no weights to fold into makes of an `Affine`."""
        layer = node.operation
        name = f"'{layer.name}' {where} it"
        if graph_of(layer) is not None:
            raise UnfoldableError(f"{name} is a model of its own")
        try:
            moved = through(node, affine, axes, before=where == "before")
        except UnfoldableError as reason:
            raise UnfoldableError(f"{name} {reason}") from None
        if self._fusing:
            raise UnfoldableError(
                f"{name} is of type {type(layer).__name__}, and only a linear layer "
                "directly before it can take it in"
            )
        return moved

    def _check_target(self, target, norm, where):
        name = f"'{target.name}'"
        if adapts(target):
            raise UnfoldableError(
                f"{name} {where} it follows its inputs (`keras_bn.adapt`)"
            )
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
        self._check_alone(target, f"{name} ")

    def _check_alone(self, layer, name=""):
        if not self._view.called_once(layer):
            raise UnfoldableError(
                f"{name}is shared: it is called in {self._view.places(layer)} places"
            )

    def _take(self, target, side, affine, axes, rank):
        edit = self.edits.get(id(target)) or linear(target, rank)
        try:
            getattr(edit, side)(affine, axes)
        except UnfoldableError as reason:
            raise UnfoldableError(f"'{target.name}' {reason}") from None
        self.edits[id(target)] = edit


_OUTSIDE = "it is an attribute of a layer, and only graphs show what is next to it"
_WITHIN = "it is folded already, by the layer of `quantize_aware` around it"
_OTHERWISE = "its class has a `call` of its own, so what it computes is not known"


def _outside(path, closed, whole):
    """Why a normalization is in no graph, given the layers that are not open."""
    around = [p for p in closed if path.startswith(f"{p}/") or p == whole]
    if not around:
        return _OUTSIDE
    holder = max(around, key=lambda p: (p != whole, len(p)))
    if holder == whole:
        return closed[holder].removesuffix(".")
    return f"'{holder}' around it cannot be opened: {closed[holder]}"


class _Remaining:
    """The calls of a model without those of normalizations that are folded."""

    def __init__(self, view):
        self._view = view
        self._sources: dict[int, object] = {}
        # The tensors that one replaces, by its `id`.
        self._replaced: dict[int, list] = {}

    def bypass(self, node):
        """Take out a call, so that its input replaces its output."""
        output, source = node.outputs[0], self.source(input_of(node))
        self._sources[id(output)] = source
        tensors = [output, *self._replaced.pop(id(output), [])]
        self._replaced.setdefault(id(source), []).extend(tensors)

    def source(self, tensor):
        """The tensor that replaces this one, now that some calls are out."""
        while id(tensor) in self._sources:
            tensor = self._sources[id(tensor)]
        return tensor

    def producer(self, tensor):
        return self._view.producer(self.source(tensor))

    def _same(self, tensor):
        source = self.source(tensor)
        return [source, *self._replaced.get(id(source), [])]

    def consumers(self, tensor):
        """The calls still there that take a tensor."""
        return [
            node
            for same in self._same(tensor)
            for node in self._view.consumers(same)
            if id(node.outputs[0]) not in self._sources
        ]

    def is_output(self, tensor):
        return any(self._view.is_output(same) for same in self._same(tensor))
