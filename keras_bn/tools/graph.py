"""Walking and rebuilding Keras models: all that knows how Keras keeps its graph."""

import contextlib
import tempfile
import warnings
from typing import Any

import keras
from keras import tree
from keras.src.models.functional import Functional, functional_like_constructor
from keras.src.trainers.trainer import Trainer
from keras.src.utils import is_default


def walk(model, path=()):
    """Every layer of a model to any depth, once, in the order Keras keeps them.

    Args:
        model: a layer or model.

    Returns:
        An iterator of `(path, layer)`, where `path` joins the names of the layers
        around it with slashes. The model itself comes first, with an empty path.
    """
    seen = set()

    def visit(layer, path):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        yield "/".join(path), layer
        for child in layer._layers:
            yield from visit(child, (*path, child.name))

    return visit(model, tuple(path))


def is_graph(layer):
    """Whether a layer is a Functional or Sequential model."""
    return isinstance(layer, Functional | keras.Sequential)


def scope(model):
    """The scope that new variables of a model's copies are to be made in."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


class Copier:
    """Copies layers and models, putting other layers in the place of some.

    Called with a layer, it gives that layer's copy; the same copy every time, so that
    what is shared in the model is shared in its copy, at any depth. Functional and
    Sequential models are built anew from their graph. A layer or subclassed model
    that holds others as attributes is made from its config and built as the original
    was; then those of its sublayers that are to be others are exchanged.

    Args:
        wants: `wants(layer)`, whether another layer is to stand in its place.
        make: `make(layer)`, that other layer, not yet built.
        fill: `fill(layer, other)`, which gives the built other layer its state.
        skip: the layers to leave out of the graphs, by `id`: their input is passed on.
    """

    def __init__(self, wants, make, fill=None, skip=frozenset()):
        self._wants = wants
        self._make = make
        self._fill = fill or _copy_state
        self._skip = skip
        self._copies = {}

    def __call__(self, layer):
        if id(layer) not in self._copies:
            self._copies[id(layer)] = layer, self._copy(layer)
        return self._copies[id(layer)][1]

    def copy(self, model, compiled=True):
        """The finished copy of a model: its layers, their state, its compilation."""
        classes = {type(layer).__name__: type(layer) for _, layer in walk(model)}
        own = {k: c for k, c in classes.items() if not c.__module__.startswith("keras")}
        with scope(model), keras.saving.custom_object_scope(own):
            new = self(model)
            self._transfer()
            if compiled:
                _copy_compilation(model, new, self._variables())
        return new

    def exchange(self, model):
        """Exchange layers within a model that is no graph, instead of copying it."""

        def within(holder):
            for inner in list(holder._layers):
                if self._wants(inner) or is_graph(inner):
                    if self._holds_wanted(inner):
                        _replace(holder, inner, self(inner))
                else:
                    within(inner)

        with scope(model):
            within(model)
            self._transfer()
            kept = {id(v): v for v in model.variables}
            _copy_compilation(model, model, {**kept, **self._variables()})

    def _transfer(self):
        """Give every copy the state of its original."""
        for old, new in self._copies.values():
            if self._wants(old):
                self._fill(old, new)
            elif isinstance(old, keras.layers.Layer) and not is_graph(old):
                _copy_state(old, new, self._copies)

    def _variables(self):
        """The copy of each variable, by the `id` of the original."""
        return {
            id(a): b
            for old, new in self._copies.values()
            if isinstance(old, keras.layers.Layer) and not is_graph(old)
            for a, b in zip(old.variables, new.variables, strict=True)
        }

    def _holds_wanted(self, layer):
        return any(self._wants(inner) for _, inner in walk(layer))

    def _copy(self, layer):
        if not isinstance(layer, keras.layers.Layer):
            return type(layer).from_config(layer.get_config())
        if self._wants(layer):
            return build_alike(self._make(layer), layer)
        if isinstance(layer, keras.Sequential):
            return self._sequential(layer)
        if isinstance(layer, Functional):
            return self._functional(layer)
        new = build_alike(_remake(layer), layer)
        for inner, present in zip(list(layer._layers), list(new._layers), strict=False):
            if self._holds_wanted(inner):
                _replace(new, present, self(inner))
        return new

    def _sequential(self, model):
        layers = [self(layer) for layer in model.layers if id(layer) not in self._skip]
        first = model._layers[0] if model._layers else None
        if isinstance(first, keras.layers.InputLayer):
            layers.insert(0, _remake(first))
        new = type(model)(layers, name=model.name)
        new._trainable = model._trainable
        return new

    def _functional(self, model):
        if not functional_like_constructor(type(model)):
            raise ValueError(
                f"Cannot copy '{model.name}': {type(model).__name__} makes its graph "
                "in its own constructor. Give the graph alone: "
                "`keras.Model(model.input, model.output)`."
            )

        def new_input(tensor):
            return _remake(tensor._keras_history.operation).output

        inputs = tree.map_structure(new_input, model.input)
        tensors = dict(
            zip(map(id, model.inputs), tree.flatten(inputs), strict=True),
        )
        for node in nodes(model):
            args, kwargs = node.arguments.fill_in(tensors)
            if id(node.operation) in self._skip:
                outputs = args[0] if args else kwargs["inputs"]
            else:
                outputs = self(node.operation)(*args, **kwargs)
            outputs = tree.flatten(outputs)
            tensors.update(zip(map(id, node.outputs), outputs, strict=True))
        outputs = tree.map_structure(lambda t: tensors[id(t)], model.output)
        new = type(model)(inputs, outputs, name=model.name)
        new._trainable = model._trainable
        return new


def view(model):
    """A graph model as a Functional one, of the same layers and tensors."""
    if isinstance(model, keras.Sequential):
        return keras.Model(model.inputs, model.outputs)
    return model


def nodes(model):
    """The calls of a Functional model's graph, each after those it takes input from.

    Args:
        model: a Functional model.

    Returns:
        A list of Keras nodes, with `operation`, `arguments`, `input_tensors` and
        `outputs`; the inputs' own nodes are left out.
    """
    by_depth = model._nodes_by_depth
    calls = [n for depth in sorted(by_depth, reverse=True) for n in by_depth[depth]]
    return [n for n in calls if n.operation and not n.is_input]


def input_of(node):
    """The tensor that a call is about: its first, or the one called `inputs`."""
    arguments = node.arguments
    return arguments.args[0] if arguments.args else arguments.kwargs["inputs"]


def _remake(layer):
    """A new layer of the same class and config."""
    if type(layer) is keras.layers.Lambda:
        # Its config holds byte code, which Keras rightly distrusts; the function
        # itself is at hand.
        config = {k: v for k, v in layer.get_config().items() if k not in _OF_LAMBDA}
        return keras.layers.Lambda(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=layer.arguments,
            **config,
        )
    try:
        return type(layer).from_config(layer.get_config())
    except Exception as error:
        raise ValueError(
            f"Cannot copy '{layer.name}': {type(layer).__name__} cannot be made from "
            f"its config ({type(error).__name__}). Give it `get_config` and, where "
            "needed, `from_config`; or, if it is a subclassed model or layer that "
            "holds others as attributes, convert it with `in_place=True`."
        ) from error


_OF_LAMBDA = {"function", "output_shape", "mask", "arguments"}


def build_alike(new, old):
    """Build `new` for the inputs that `old` was built for; returns `new`."""
    if not isinstance(old, keras.layers.Layer) or not old.built or new.built:
        return new
    config = old.get_build_config()
    if not config:
        return new
    shape = config.get("input_shape")
    by_run = is_default(new.build) and not isinstance(new, keras.Model)
    # What has sublayers but no build() is built by running it, now or when called.
    if not by_run or (shape and new._build_by_run_for_single_pos_arg(shape)):
        new.build_from_config(config)
    return new


def _replace(holder, old, new):
    """Put layer `new` in the place of `old`, wherever `holder` holds it."""
    seen = set()

    def replaced(value):
        if value is old:
            return new
        # By type(), since TensorFlow's wrappers pass for dicts and lists.
        kind = type(value)
        if issubclass(kind, tuple):
            parts = [replaced(part) for part in value]
            return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
        if id(value) in seen:
            return value
        seen.add(id(value))
        if issubclass(kind, list):
            for i, part in enumerate(value):
                list.__setitem__(value, i, replaced(part))
        elif issubclass(kind, dict):
            for key, part in list(value.items()):
                dict.__setitem__(value, key, replaced(part))
        return value

    for name, value in list(vars(holder).items()):
        if name != "_tracker":
            object.__setattr__(holder, name, replaced(value))
    ids = holder._tracker.stored_ids["layers"]
    ids.discard(id(old))
    ids.add(id(new))


def _copy_state(old, new, elsewhere=()):
    """Give `new` the weights, random state, assets and flags of `old`, to any depth.

    Sublayers with an `id` in `elsewhere` are left out.
    """
    if len(_own(old)) != len(_own(new)) or len(old._layers) != len(new._layers):
        raise ValueError(
            f"Cannot copy '{old.name}': a {type(old).__name__} made from its config "
            "has other weights or sublayers. They must follow from the config and the "
            "shapes given to build()."
        )
    new._trainable = old._trainable
    store: dict = {}
    old.save_own_variables(store)
    if store:
        new.load_own_variables(store)
    _copy_flags(old, new)
    for mine, theirs in zip(old._seed_generators, new._seed_generators, strict=True):
        theirs.state.assign(mine.state)
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    for mine, theirs in zip(old._layers, new._layers, strict=True):
        if id(mine) not in elsewhere:
            theirs.name = mine.name
            _copy_state(mine, theirs, elsewhere)


def copy_variables(old, new):
    """Give `new` the weights of `old`, in order, whatever they are."""
    for mine, theirs in zip(old.variables, new.variables, strict=True):
        theirs.assign(mine)
    _copy_flags(old, new)


def _copy_flags(old, new):
    for mine, theirs in zip(_own(old), _own(new), strict=True):
        if mine.trainable != theirs.trainable:
            theirs.trainable = mine.trainable


def _own(layer):
    """A layer's own variables, without those of its sublayers."""
    return layer._trainable_variables + layer._non_trainable_variables


@contextlib.contextmanager
def intercepted(calls):
    """Let other functions stand for the `call` of layers for a while.

    Args:
        calls: pairs of a layer and the function that is called instead.
    """
    calls = list(calls)
    for layer, call in calls:
        vars(layer)["call"] = call
    try:
        yield
    finally:
        for layer, _ in calls:
            vars(layer).pop("call", None)


@contextlib.contextmanager
def state_kept(model):
    """Put back whatever runs of the model change in it: random and recurrent state."""
    variables = [
        variable
        for _, layer in walk(model)
        for variable in (
            *layer._non_trainable_variables,
            *(generator.state for generator in layer._seed_generators),
        )
    ]
    before = [keras.ops.convert_to_numpy(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def forget_training(model):
    """Have a model, and the models in it, trace their training step anew."""
    for _, layer in walk(model):
        if isinstance(layer, keras.Model):
            layer.train_function = None


def compile_alike(new, old):
    """Compile `new` as `old` is, with an optimizer and metrics of its own.

    Returns:
        Whether `new` is compiled now: not if `old` isn't, or does it its own way.
    """
    if not getattr(old, "compiled", False):
        return False
    if type(old).compile is not Trainer.compile:
        warnings.warn(
            f"'{old.name}' has a compile() of its own; compile the copy yourself.",
            stacklevel=5,
        )
        return False
    settings = dict(old._compile_config.config)
    optimizer = old.optimizer
    settings["optimizer"] = type(optimizer).from_config(optimizer.get_config())
    for key in ("metrics", "weighted_metrics"):
        settings[key] = tree.map_structure(_remake_metric, settings[key])
    new.compile(**settings)
    return True


def _copy_compilation(old, new, variables):
    """Compile `new` as `old` is, with the state that the optimizer has reached."""
    optimizer: Any = getattr(old, "optimizer", None)
    if not compile_alike(new, old) or not optimizer.built:
        return
    # One that scales the loss leaves the variables to the one within.
    holder = getattr(optimizer, "inner_optimizer", optimizer)
    new.optimizer.build([variables[id(v)] for v in holder._trainable_variables])
    for mine, theirs in zip(optimizer.variables, new.optimizer.variables, strict=True):
        theirs.assign(mine)


def _remake_metric(metric):
    if isinstance(metric, keras.Metric):
        return type(metric).from_config(metric.get_config())
    return metric
