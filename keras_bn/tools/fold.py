"""Folding batch normalizations into the layers next to them, for inference."""

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import keras
import numpy as np

from keras_bn.pages.display import Content, Displayed
from keras_bn.pages.plain import escaped
from keras_bn.surgery.classes import as_graphs, warn_of_folded
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.exchange import bypass, exchange
from keras_bn.surgery.functional import opened
from keras_bn.surgery.graph import children, graph_of, input_of, scope
from keras_bn.surgery.norms import (
    MadeByTool,
    adapts,
    computes_otherwise,
    is_keras,
    is_normalization,
    is_ours,
    plain,
)
from keras_bn.surgery.private import get_keras_mask, require
from keras_bn.surgery.rebuild import rebuild
from keras_bn.surgery.view import ModelView
from keras_bn.tools.branches import Branch, merge, placements, zeros_around
from keras_bn.tools.commute import (
    changes_nothing,
    divided,
    parts_of,
    signs_of,
    through,
    widened,
)
from keras_bn.tools.fuse import Deferring, Merging, Passing, Way, has_own_call, separate
from keras_bn.tools.linear import (
    Affine,
    Linear,
    Normalization,
    UnfoldableError,
    is_activated,
    is_linear,
    linear,
)
from keras_bn.tools.remaining import Remaining


class Fold(NamedTuple):
    """What folding does to one batch normalization.

    Args:
        layer: its path in the model.
        into: the path of the layer that it is folded into, or of several, with commas;
            None if it stays.
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

    Attributes:
        sums: a `Fold` of each sum that one layer computes: `layer` names all that it
            adds, as `c1 + c3 - bn`, and `into` that layer.
    """

    def __init__(self, folds: Iterable[Fold] = ()) -> None:
        super().__init__(folds)
        self.sums: list[Fold] = []

    def __str__(self) -> str:
        return "\n".join(map(str, [*self, *self.sums]))

    def _in_a_line(self):
        folded = sum(fold.into is not None for fold in self)
        return f"{folded} of {len(self)} can be folded"

    def _content(self):
        title = self._in_a_line()
        rows = [*self, *self.sums]
        return Content(title, "folds.html", {"title": title, "folds": rows})


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
    `Identity`, linear activations, `Flatten`, `Reshape`, `Permute`, concatenations,
    sums and differences. A sum of such layers that read the same tensor becomes one
    layer, if a normalization is in it or behind it: a k×k and a 1×1 convolution and a
    normalization of the tensor itself, as in RepVGG, become one convolution. The
    arithmetic is in float64; the weights keep their dtype. `plan_fold` says which
    normalizations stay, and why.

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


class FoldPlan:
    """Which normalization goes into which layer, graph by graph in calling order.

    `plan_fold` returns `folds`; `fold` returns `folded_model()`. `folded` holds the
    layers to remove, `edits` the `Linear` of each layer that changes, both by the `id`
    of the layer. `sums` holds pairs of the output of a sum and the tensor that is taken
    instead.

    Args:
        view: the `ModelView` of a built model.
        named: the view that has the paths, if it is not the same.
        closed: why layers are not open, by path, as `surgery.functional.opened` says.
        fusing: whether to plan for `freeze(model, fuse=True)` instead: `keras_bn`
            layers alone, and only into linear layers before them. `fused` then holds
            what is to stand in the place of the `call` of layers, by the `id` of each.
    """

    def __init__(self, view, named=None, closed=None, fusing=False):
        named = named or view
        view.check_built()
        self._view, self._named, self._fusing = view, named, fusing
        self.fused: dict[int, Deferring | Passing] = {}
        self._passing: list[Passing] = []
        self.folded: dict[int, keras.layers.Layer] = {}
        self.edits: dict[int, Linear] = {}
        self.sums: list[tuple] = []
        # The signs and paths of all that a layer adds, by its path.
        self._added: dict[str, list[tuple[int, str]]] = {}
        self._calls = Remaining(view, inside=not fusing)
        folds: dict[int, Fold] = {}
        found = -1
        while found < len(self.folded) + len(self.sums):  # one may wait for another
            found = len(self.folded) + len(self.sums)
            for node in view.calls:
                norm = node.operation
                if self._concerns(norm) and id(norm) not in self.folded:
                    folds[id(norm)] = self._place(node)
                elif _is_sum(node) and self._calls.is_there(node):
                    folds |= self._merge(node)
        within = {
            id(layer.folded_normalization)
            for _, layer in named.layers
            if isinstance(layer, MadeByTool)
        }
        holders = [la for _, la in view.layers if graph_of(la) is None]
        held = {id(child) for holder in holders for child in children(holder)}
        self.folds = Folds()
        self.folds.sums = [Fold(_terms(a), into) for into, a in self._added.items()]
        for path, layer in named.layers:
            if computes_otherwise(layer):
                self.folds.append(Fold(path, None, _OTHERWISE))
            elif self._concerns(layer):
                outside = _OUTSIDE if id(layer) in held else _UNCALLED
                outside = _outside(path, closed or {}, named.path(named.model), outside)
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
        others = {id(of(tensor)): of(other) for tensor, other in self.sums}
        removed = [*self.folded.values(), *self._identities()]
        bypass(view, [of(layer) for layer in removed], others)
        if self.folded:
            as_graphs(view)
        return copy

    def _identities(self):
        """Layers of opened ones that do nothing, and that Keras cannot save.

        It makes no config of an `Identity` with a policy of its own.
        """
        found, kept = {}, set()
        for node in self._view.calls if self._view is not self._named else ():
            layer = node.operation
            if type(layer) is not keras.layers.Identity:
                continue
            found[id(layer)] = layer
            try:
                layer.get_config()
                kept.add(id(layer))
            except NotImplementedError:
                if node.input_tensors[0].dtype != node.outputs[0].dtype:
                    kept.add(id(layer))
        return [layer for key, layer in found.items() if key not in kept]

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
                targets = place(node, edit)
            except UnfoldableError as reason:
                reasons.append(str(reason))
                continue
            self.edits.pop(id(norm), None)
            self.folded[id(norm)] = norm
            self._calls.replace(node.outputs[0], input_of(node))
            return Fold(path, ", ".join(map(self._named.path, targets)))
        return Fold(path, None, "; ".join(reasons))

    def _before(self, node, norm):
        """Fold into the linear layers before; returns them."""
        self._passing = []
        ends = self._ends(node, input_of(node), norm.affine, norm.axes, norm.layer)
        targets = {id(target): target for target, *_ in ends}
        if len(targets) < len(ends):
            raise UnfoldableError("parts of a sum or concatenation before it are one")
        for target, affine, axes, rank in ends:
            self._take("fold_output", target, affine, axes, rank)
            if self._fusing:
                self.fused[id(target)] = Deferring(self.edits[id(target)], axes)
        self.fused |= {id(call.layer): call for call in self._passing}
        return list(targets.values())

    def _ends(self, node, tensor, affine, axes, norm, name="it"):
        """The layers before a call that take in an `Affine`, and what each takes in."""
        tensor = self._calls.source(tensor)
        producer = self._calls.producer(tensor)
        if producer is None:
            raise UnfoldableError(f"{name} takes an input of the model")
        target = producer.operation
        name = f"'{target.name}'"
        if is_linear(target):
            self._check_target(target, norm, "before it")
            self._check_read_once(tensor, node, f"{name} before it")
            rank = len(input_of(producer).shape)
            with _about(name):
                self._edit(target, rank).along_output(axes)
            return [(target, affine, axes, rank)]
        shares = self._shares(producer, affine, axes)
        self._check_read_once(tensor, node, f"{name} before it")
        if self._fusing:
            self._check_target(target, norm, "before it")
            if not changes_nothing(producer):
                ways = self._ways(producer, affine.scale.size, axes)
                self._passing.append(Passing(target, axes, ways))
        return [
            end
            for part, share, axes in shares
            for end in self._ends(producer, part, share, axes, norm, name)
        ]

    def _shares(self, node, affine, axes):
        """The tensors that a call takes, what each takes of an `Affine`, and its axes.

        They are those of the parts of a sum or a concatenation, or the one tensor.
        """
        parts = parts_of(node)
        if parts is None:
            return [(input_of(node), *self._through(node, affine, axes, "before it"))]
        with _about(f"'{node.operation.name}' before it"):
            shares = zip(parts[0], divided(parts, affine, axes), strict=True)
        return [(part, share, axes) for part, share in shares]

    def _ways(self, node, size, axes):
        """The `Way` of each tensor that a call takes."""
        shares = self._shares(node, Affine(np.arange(size), np.ones(size)), axes)
        return [Way(axes, a.scale, bool(a.shift.any())) for _, a, axes in shares]

    def _after(self, node, norm):
        """Fold into the linear layer after; returns it in a list."""
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
                self._check_target(target, norm.layer, "after it")
                if is_normalization(target) and node.arguments.kwargs.get("training"):
                    raise UnfoldableError(f"{name} is called with `training`")
                rank = len(input_of(node).shape)
                self._take("fold_input", target, affine, axes, rank)
                return [target]
            parts = parts_of(node)
            if parts is None:
                affine, axes = self._through(node, affine, axes, "after it")
            elif parts[1] is None:
                if not self._is_inner(node):
                    self._branches(node)
                    raise UnfoldableError(f"{name} after it is a sum")
            else:
                same = [self._calls.source(t) is tensor for t in parts[0]]
                with _about(f"{name} after it"):
                    affine = widened(parts, affine, axes, same)

    def _merge(self, node):
        """Let one layer compute a sum that a normalization is in or behind.

        Returns:
            A dict of the `Fold` of each normalization in it, by `id`.
        """
        try:
            parts, sums, (into, kernel, bias) = self._branches(node)
            calls = self._sum_calls(node, parts, into) if self._fusing else {}
        except UnfoldableError:
            return {}
        around = [part.edit.layer for part in parts if part.edit]
        around += [n.operation for n in self._calls.consumers(node.outputs[0])]
        if not any(is_normalization(la) or id(la) in self.edits for la in around):
            return {}
        target = into.edit.layer
        self.fused |= calls
        into.edit.take_convolution(kernel, bias)
        path, folds, added = self._named.path(target), {}, []
        for part in parts:
            own = self._named.path(part.edit.layer) if part.edit else "identity"
            inner = self._added.pop(own, [(1, own)])
            added += [(part.sign * sign, each) for sign, each in inner]
            if part.edit is None or part.edit.layer is target:
                continue
            layer = part.edit.layer
            if not self._fusing:
                self.edits.pop(id(layer), None)
            if is_normalization(layer):
                self.folded[id(layer)] = layer
                folds[id(layer)] = Fold(own, path)
        self._added[path], self.edits[id(target)] = added, into.edit
        self.sums += [(each.outputs[0], tensor) for each, tensor in into.way]
        for each in sums:
            self._calls.replace(each.outputs[0], into.way[-1][1])
        for part in parts:
            self._calls.drop(part.way[-1][1])
        return folds

    def _sum_calls(self, node, parts, into):
        """What stands in the place of the `call` of a sum and of its linear layers."""
        self._check_target(node.operation, into.edit.layer, "")
        axes = (into.edit.channel_axis(len(into.shape)),)
        calls, made = {}, [part.edit and part.edit.layer for part in parts]
        for part, layer in zip(parts, made, strict=True):
            if len(part.way) > 1 or part.zeros.any() or is_keras(layer):
                raise UnfoldableError(f"'{part.name}' does not say what it reads")
            if layer and not is_ours(layer):
                calls[id(layer)] = Deferring(part.edit, axes)
        ways = self._ways(node, node.outputs[0].shape[axes[0]], axes)
        ways = [way._replace(itself=not la) for way, la in zip(ways, made, strict=True)]
        added = made, placements(into, parts), made.index(into.edit.layer)
        merging = Merging(node.operation, axes, ways, *added)
        return {**calls, id(node.operation): merging}

    def _branches(self, node):
        """The parts of a sum, and how one layer can compute it.

        Returns:
            `(parts, sums, merged)`: a list of `Branch`, the calls of this sum and those
            in it, and what `merge` gives.
        """
        sums: list[tuple] = [(node, [], 1)]
        ends, signs = [], []
        for each, way, outer in sums:  # it grows
            for tensor, own in zip(parts_of(each)[0], signs_of(each), strict=True):
                inner, here = self._calls.producer(tensor), [*way, (each, tensor)]
                if inner is not None and _is_sum(inner) and self._is_inner(inner):
                    sums.append((inner, here, outer * own))
                else:
                    ends.append(here)
                    signs.append(outer * own)
        readings = [self._readings(way[-1][1]) for way in ends]
        missing = None
        for source in [r.tensor for each in readings for r in each if r.maker]:
            chosen = [
                next((r for r in each if r.tensor is source), None) for each in readings
            ]
            if None not in chosen:
                break
            missing = missing or self._calls.producer(ends[chosen.index(None)][-1][1])
        else:
            other = f"'{missing.operation.name}'" if missing else "an input"
            raise UnfoldableError(
                f"'{node.operation.name}' adds {other}, which is not linear in what "
                "its other parts read"
            )
        parts = list(map(self._branch, ends, chosen, signs))
        with _about(f"in '{node.operation.name}',"):
            merged = merge(parts)
            into = merged[0]
            tensors = node.outputs[0], into.way[-1][1]
            if len({get_keras_mask(tensor) is None for tensor in tensors}) > 1:
                raise UnfoldableError(f"'{into.name}' has not the mask of the sum")
            return parts, [each for each, *_ in sums], merged

    def _readings(self, tensor):
        """What a tensor may be taken to read: itself, or what a linear layer reads."""
        itself = list(self._back(tensor, None))
        maker = self._calls.producer(itself[-1].tensor)
        if maker is None or not is_linear(maker.operation) or itself[-1].zeros.any():
            return itself
        return [*self._back(input_of(maker), maker), *itself]

    def _back(self, tensor, maker):
        """A tensor, and those that it is the same as, but for zeros around them."""
        zeros = np.zeros((len(tensor.shape), 2), int)
        while True:
            tensor = self._calls.source(tensor)
            yield _Reading(tensor, zeros, maker)
            node = self._calls.producer(tensor)
            more = None if node is None else zeros_around(node)
            if more is None:
                return
            zeros, tensor = zeros + more, input_of(node)

    def _branch(self, way, reading, sign):
        """The `Branch` of a part of a sum; refuses what cannot be in another layer."""
        whole, (reader, tensor), maker = way[0][0], way[-1], reading.maker
        if maker is None:
            return Branch("identity", None, tensor.shape, reading.zeros, sign, way)
        layer, where = maker.operation, f"in '{whole.operation.name}'"
        name = f"'{layer.name}' {where}"
        if maker.arguments.kwargs.get("training"):
            raise UnfoldableError(f"{name} is called with `training`")
        given, wanted = maker.outputs[0].dtype, whole.outputs[0].dtype
        if given != wanted:
            raise UnfoldableError(f"{name} computes in {given}, not in {wanted}")
        self._check_target(layer, layer, where)
        while reader is not maker:
            tensor = self._calls.source(tensor)
            self._check_read_once(tensor, reader, name)
            reader = self._calls.producer(tensor)
            tensor = input_of(reader)
        with _about(name):
            edit = self._edit(layer, len(tensor.shape))
        return Branch(layer.name, edit, tensor.shape, reading.zeros, sign, way)

    def _is_inner(self, node):
        """Whether the output of a sum is a part of another sum alone."""
        tensor = node.outputs[0]
        consumers = self._calls.consumers(tensor)
        alone = len(consumers) == 1 and not self._calls.is_output(tensor)
        return alone and _is_sum(consumers[0])

    def _through(self, node, affine, axes, where):
        """What a layer with no weights to fold into makes of an `Affine`."""
        layer = node.operation
        name = f"'{layer.name}' {where}"
        if graph_of(layer) is not None:
            raise UnfoldableError(f"{name} is a model of its own")
        with _about(name):
            return through(
                node, affine, axes, before=where == "before it", trains=self._fusing
            )

    def _check_target(self, target, norm, where):
        name = f"'{target.name}'"
        if self._fusing and self._named.path(target) is None:
            raise UnfoldableError(f"{name} {where} is not a layer of the model")
        if adapts(target):
            raise UnfoldableError(
                f"{name} {where} follows its inputs (`keras_bn.adapt`)"
            )
        if self._fusing and where == "before it" and is_normalization(target):
            raise UnfoldableError(f"{name} {where} is a batch normalization")
        if self._fusing and has_own_call(target):
            raise UnfoldableError(f"{name} {where} has a `call` set on it")
        if self._fusing and target.activity_regularizer is not None:
            raise UnfoldableError(f"{name} {where} has a regularizer of its output")
        if target.quantization_mode is not None or getattr(
            target, "lora_enabled", False
        ):
            raise UnfoldableError(f"{name} {where} is quantized or has LoRA weights")
        if target.compute_dtype != norm.compute_dtype:
            raise UnfoldableError(
                f"{name} {where} computes in {target.compute_dtype}, not in "
                f"{norm.compute_dtype}"
            )
        self._check_alone(target, f"{name} ")
        if where != "after it" and is_activated(target):
            activation = getattr(target.activation, "__name__", target.activation)
            raise UnfoldableError(f"{name} {where} has the activation {activation}")

    def _check_alone(self, layer, name=""):
        if not self._view.called_once(layer):
            raise UnfoldableError(
                f"{name}is shared: it is called in {self._view.places(layer)} places"
            )

    def _check_read_once(self, tensor, node, name):
        """Refuse a tensor that anything but one call reads."""
        others = [n for n in self._calls.consumers(tensor) if n is not node]
        if others:
            maker = self._calls.producer(tensor).operation.name
            raise UnfoldableError(
                f"'{others[0].operation.name}' also uses the output of '{maker}'"
            )
        if self._calls.is_output(tensor):
            raise UnfoldableError(f"{name} is an output of the model")

    def _take(self, side, target, affine, axes, rank):
        edit = self._edit(target, rank)
        with _about(f"'{target.name}'"):
            getattr(edit, side)(affine, axes)
        self.edits[id(target)] = edit

    def _edit(self, layer, rank):
        return self.edits.get(id(layer)) or linear(layer, rank)


class _Reading(NamedTuple):
    """A tensor that a part of a sum reads, with zeros around it, by a linear layer."""

    tensor: keras.KerasTensor
    zeros: np.ndarray
    maker: object


def _terms(added):
    """A sum in words, of signs and names."""
    terms = "".join(f" {'-' if sign < 0 else '+'} {name}" for sign, name in added)
    return terms.removeprefix(" + ").lstrip()


def _is_sum(node):
    parts = parts_of(node)
    return parts is not None and parts[1] is None


@contextlib.contextmanager
def _about(name):
    """Begin a reason with a name."""
    try:
        yield
    except UnfoldableError as reason:
        raise UnfoldableError(f"{name} {reason}") from None


_OUTSIDE = "it is an attribute of a layer, and only graphs show what is next to it"
_UNCALLED = "the model holds it, and does not call it"
_WITHIN = "it is folded already, by the layer of `quantize_aware` around it"
_OTHERWISE = "its class has a `call` of its own, so what it computes is not known"


def _outside(path, closed, whole, otherwise):
    """Why a normalization is in no graph, given the layers that are not open."""
    around = [p for p in closed if path.startswith(f"{p}/") or p == whole]
    if not around:
        return otherwise
    holder = max(around, key=lambda p: (p != whole, len(p)))
    if holder == whole:
        return closed[holder].removesuffix(".")
    return f"'{holder}' around it cannot be opened: {closed[holder]}"
