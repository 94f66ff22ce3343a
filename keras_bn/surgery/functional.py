"""A Functional model of the layers of any model, by calling it on symbolic tensors.

Each layer of the user's own that holds layers is opened: its `call` runs, and the
layers in it become calls of the graph. `Layer.__call__` runs around that `call` as
always, so inputs are cast and `training` resolved as in the model. Where that would not
give the same outputs, the layer stays closed: one call of the graph.
"""

import contextlib
import inspect
import itertools
import re
import sys
import traceback
from collections import Counter

import keras

from keras_bn.surgery.graph import children, graph_of, walk
from keras_bn.surgery.norms import computes_otherwise, is_normalization
from keras_bn.surgery.private import NONE_HIDES_TRAINING, get_keras_mask
from keras_bn.surgery.view import ModelView


class NotAGraphError(ValueError):
    """A `call` that cannot be the calls of a graph."""


def is_open(view):
    """Whether graphs show every call of a model already.

    Args:
        view: the `ModelView` of the model.
    """
    return not any(_has_own_call(layer) for _, layer in view.layers)


def functional(model, inputs=None):
    """A Functional model that calls the layers of a model.

    Args:
        model: a built model.
        inputs: a structure of `keras.Input`, as the first argument of the model.

    Returns:
        The Functional model. It has the layers of the model themselves.

    Raises:
        NotAGraphError: if no graph computes what the model does, also in training.
    """
    with _Opened(model, inputs, keep=True) as opened:
        return opened.model


@contextlib.contextmanager
def opened(view, strict=False):
    """A view of a model in which the layers of the user's own are open, for a while.

    Meanwhile, layers whose names are not unique have others.

    Args:
        view: the `ModelView` of a built model.
        strict: whether to raise if the model has no graph, instead of giving its view.

    Yields:
        `(view, closed)`: a `ModelView`, the given one where nothing can be opened; and
        why layers are closed, by path.

    Raises:
        NotAGraphError: with `strict`, as `functional`.
    """
    if not isinstance(view.model, keras.Model) or is_open(view):
        yield view, {}
        return
    with contextlib.ExitStack() as stack:
        try:
            open_model = stack.enter_context(_Opened(view.model))
        except NotAGraphError as error:
            if strict and graph_of(view.model) is None:
                raise
            result = view, {view.path(view.model): str(error)}
        else:
            closed = {view.path(la): why for la, why in open_model.closed.values()}
            result = ModelView(open_model.model), closed
        yield result


class _Opened:
    """Calls a model on symbolic tensors, and undoes on leaving what that changed.

    Args:
        model: a built model.
        inputs: as in `functional`.
        keep: whether the layers keep the calls of the new model.

    Attributes:
        model: the Functional model.
        closed: `(layer, reason)` of layers that could not be opened, by `id`.
    """

    def __init__(self, model, inputs=None, keep=False):
        self._model, self._keep = model, keep
        self._inputs = _inputs_of(model) if inputs is None else ((inputs,), {})
        self._layers = [layer for _, layer in walk(model)]
        if any(isinstance(la, keras.layers.TorchModuleWrapper) for la in self._layers):
            # Even on symbolic tensors a module runs, and changes its own statistics.
            raise _RefusedError(_refusal(model, "it holds modules of PyTorch"))
        self._own = {id(la) for la in self._layers if _has_own_call(la)}
        self.closed: dict = {}
        self._refusal = ""
        for layer in self._layers:
            why = _why_closed(layer) if id(layer) in self._own else None
            if why:
                self._close(layer, why)
        self._restored = contextlib.ExitStack()

    def __enter__(self):
        try:
            with self._restored:
                for layer in self._layers:
                    self._restored.callback(_put_back, layer, _calls_of(layer))
                outputs = self._call()
                flat = keras.tree.flatten(self._inputs)
                graph = _between(flat, keras.tree.flatten(outputs))
                _note(graph, self._layers)
                self._make_unique(graph)
                (args, kwargs) = self._inputs
                first = args[0] if args else list(kwargs.values())
                self.model = keras.Model(first, outputs, name=self._model.name)
                if self._keep:
                    self._restored.pop_all()
                else:
                    self._restored = self._restored.pop_all()
        except NotAGraphError:
            raise
        return self

    def __exit__(self, *_):
        if not self._keep:
            self._restored.close()

    def _call(self):
        """The outputs; where `training` decides what is called, less is opened."""
        while True:
            before = len(self.closed)
            traces = [self._traced(training) for training in (True, False)]
            if len(self.closed) == before:
                (_, first), (outputs, second) = traces
                if not second:  # the model itself could not be opened
                    unknown = None, "its `call` is Keras's"
                    _, why = self.closed.get(id(self._model), unknown)
                    raise _RefusedError(_refusal(self._model, why))
                culprit = _first_difference(first, second)
                if culprit is None:
                    self._share_training(first[-1].nodes, second[-1].nodes)
                    return outputs
                self._close(
                    culprit, "what it calls depends on `training` or is not repeatable"
                )

    def _traced(self, training):
        """The outputs of the model, and a `_Trace` of each call of an open layer."""
        self._traces: list[_Trace] = []
        self._histories: list = []
        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                if id(layer) in self._own or _holds(layer, self._own):
                    stack.callback(vars(layer).pop, "symbolic_call", None)
                    vars(layer)["symbolic_call"] = self._calling(layer)
            stack.enter_context(_NoReads())
            args, kwargs = self._inputs
            try:
                outputs = self._model(*args, **kwargs, training=training)
            except Exception as error:
                # Keras adds to the text of what is raised in a `call`.
                raise _RefusedError(
                    self._refusal or _refusal(self._model, _reason(error))
                ) from error
        self._restore_histories()
        return outputs, self._traces

    def _calling(self, layer):
        """What stands in the place of `symbolic_call`, which gives shapes alone."""

        def symbolic_call(*args, **kwargs):
            tensors = keras.tree.flatten((args, kwargs))
            tensors = [t for t in tensors if isinstance(t, keras.KerasTensor)]
            masked = any(get_keras_mask(t) is not None for t in tensors)
            if masked and id(layer) not in self.closed:
                self._close(layer, "its inputs have a mask")
            if id(layer) not in self.closed:
                count = len(self._traces)
                try:
                    outputs = self._call_of(layer, args, kwargs)
                    self._restore_histories()
                    flat = keras.tree.flatten(outputs)
                    if not all(isinstance(t, keras.KerasTensor) for t in flat):
                        raise NotAGraphError("it does not give tensors alone")
                    trace = _Trace(layer, tensors, flat, count)
                except Exception as error:
                    if isinstance(error, _RefusedError):
                        raise
                    del self._traces[count:]
                    self._close(layer, _reason(error))
                else:
                    self._traces.append(trace)
                    self._histories += [(t, t._keras_history) for t in flat]
                    return outputs
            return type(layer).symbolic_call(layer, *args, **kwargs)

        return symbolic_call

    def _call_of(self, layer, args, kwargs):
        graph = graph_of(layer)
        if graph is None:
            return layer.call(*args, **kwargs)
        given = keras.tree.flatten(args[0] if args else kwargs["inputs"])
        given = [
            x if x.dtype == t.dtype else keras.ops.cast(x, t.dtype)
            for x, t in zip(given, graph.inputs, strict=True)
        ]

        def called(operation):
            # As Keras does: the graph may have noted the default of a `call`.
            if training is None or not isinstance(operation, keras.layers.Layer):
                return operation
            return lambda *a, **k: operation(*a, **{**k, "training": training})

        training = kwargs.get("training")
        outputs = graph._run_through_graph(given, called)
        single = isinstance(outputs, list | tuple) and len(outputs) == 1
        return outputs[0] if single else outputs

    def _restore_histories(self):
        """Let tensors come from the calls inside of an open layer, not from it."""
        for tensor, history in self._histories:
            tensor._keras_history = history

    def _close(self, layer, why):
        if layer is self._model:
            self._refusal = _refusal(layer, why)
            raise _RefusedError(self._refusal)
        self.closed[id(layer)] = layer, why

    def _share_training(self, first, second):
        """Leave `training` to the call of the model, where it is that of the model."""
        for one, node in zip(first, second, strict=True):
            options = node.arguments.kwargs
            if "training" not in options or options["training"] is None:
                continue
            if one.arguments.kwargs.get("training") is not options["training"]:
                rest = {k: v for k, v in options.items() if k != "training"}
                if not NONE_HIDES_TRAINING:
                    # Left out, `Resizing` sets it to True for what comes after.
                    rest["training"] = None
                node.arguments = type(node.arguments)(*node.arguments.args, **rest)
            elif self._keep:
                raise NotAGraphError(
                    f"'{self._model.name}' cannot be a Functional model: it calls "
                    f"'{node.operation.name}' with a `training` of its own, and Keras "
                    "gives every layer of a graph the `training` of the whole."
                )

    def _make_unique(self, graph):
        """Give layers names that differ, for as long as the model is open."""
        operations = list({id(n.operation): n.operation for n in graph}.values())
        inputs = [t._keras_history.operation for t in keras.tree.flatten(self._inputs)]
        names = Counter(op.name for op in [*inputs, *operations])
        for operation in operations:
            name = operation.name
            if names[name] == 1:
                continue
            if isinstance(operation, keras.layers.Layer):
                if self._keep:
                    raise NotAGraphError(
                        f"'{self._model.name}' cannot be a Functional model: "
                        f"{names[name]} of its layers have the name '{name}', and a "
                        "graph needs names that differ."
                    )
                self._restored.callback(setattr, operation, "name", name)
            numbered = (f"{name}_{i}" for i in itertools.count(1))
            operation.name = next(new for new in numbered if new not in names)
            names[name] -= 1
            names[operation.name] = 1


class _RefusedError(NotAGraphError):
    """The model itself cannot be opened."""


class _NoReads(keras.StatelessScope):
    """Refuses what reads a variable outside of a layer: it would be a constant."""

    def get_current_value(self, variable):
        raise NotAGraphError(
            f"it computes with the variable '{variable.path}' outside of its layer"
        )


class _Trace:
    """What one call of an open layer calls.

    Args:
        layer: the open layer.
        inputs, outputs: its tensors.
        count: how many calls of open layers came before this and those in it.
    """

    def __init__(self, layer, inputs, outputs, count):
        self.layer, self.count = layer, count
        self.nodes = _between(inputs, outputs)
        for node in self.nodes:
            _infer_sizes(node)
        numbers = {id(t): i for i, t in enumerate(inputs)}
        self.parts = [_described(node, numbers) for node in self.nodes]
        self.parts.append([numbers.get(id(t)) for t in outputs])


def _infer_sizes(node):
    """Let a reshape infer the size that is not known; refuse other unknown sizes.

    `ops.shape` gives None for such a size, and a graph cannot run with None.
    """
    operation = node.operation
    if isinstance(operation, keras.layers.Layer):
        return
    for name, value in list(vars(operation).items()):
        sizes = value if isinstance(value, list | tuple) and name[0] != "_" else ()
        unknown = [size is None for size in sizes]
        if not any(unknown):
            continue
        if name != "newshape" or sum(unknown) > 1 or -1 in sizes:
            kind = type(operation).__name__.lower()
            raise NotAGraphError(f"its {kind} to {tuple(sizes)} needs sizes not known")
        sizes = tuple(-1 if size is None else size for size in sizes)
        try:
            known = type(operation)(sizes, name=operation.name)
        except TypeError:  # on Keras 3.10 it takes no name
            known = type(operation)(sizes)
            known.name = operation.name
        known._inbound_nodes, known._outbound_nodes = _calls_of(operation)
        node.operation = known
        for tensor in node.outputs:
            history = tensor._keras_history._replace(operation=known)
            tensor._keras_history = history


def _described(node, numbers):
    """What a call calls on what, to compare two calls of one model."""
    operation = node.operation
    parts: list = [id(operation)]
    if isinstance(operation, keras.layers.Layer):
        if _is_librarys(type(operation)) and not operation.variables:
            # A `call` may make it anew each time, as `layers.Add()([x, y])`.
            # Keras makes no config of an `Identity` with a policy of its own.
            with contextlib.suppress(NotImplementedError):
                state = {k: v for k, v in operation.get_config().items() if k != "name"}
                parts = [type(operation), repr(sorted(state.items()))]
    else:
        state = {k: v for k, v in vars(operation).items() if k[0] != "_"}
        state.pop("name", None)
        parts = [type(operation), repr(sorted(state.items()))]
    options = dict(node.arguments.kwargs)
    parts.append(sorted(options))
    options.pop("training", None)
    for value in keras.tree.flatten((node.arguments.args, options)):
        if isinstance(value, keras.Variable):
            raise NotAGraphError(
                f"it computes with the variable '{value.path}' outside of its layer"
            )
        symbolic = isinstance(value, keras.KerasTensor)
        parts.append(("tensor", numbers[id(value)]) if symbolic else repr(value))
    for tensor in node.outputs:
        numbers[id(tensor)] = len(numbers)
    return parts


def _first_difference(first, second):
    """The innermost open layer that two traces differ in; None for no difference."""
    for one, two in itertools.zip_longest(first, second):
        if one is None or two is None or one.layer is not two.layer:
            return second[-1].layer
        if one.parts != two.parts or not all(map(_same_training, one.nodes, two.nodes)):
            return one.layer
    return None


def _same_training(first, second):
    """Whether `training` is that of the model, or one constant."""
    one, two = (n.arguments.kwargs.get("training") for n in (first, second))
    return one is two or (one is True and two is False)


def _between(inputs, outputs):
    """The calls between tensors, each after those that it depends on."""
    seen, order = {id(t) for t in inputs}, []
    stack = [(t, False) for t in reversed(outputs)]
    visited = set()
    while stack:
        tensor, done = stack.pop()
        history = tensor._keras_history
        if id(tensor) in seen or history.operation is None:
            continue
        node = history.operation._inbound_nodes[history.node_index]
        if done:
            seen.update(id(t) for t in node.outputs)
            order.append(node)
        elif id(node) in visited:
            continue
        elif node.is_input:
            raise NotAGraphError("it uses tensors of another graph")
        else:
            visited.add(id(node))
            stack.append((tensor, True))
            stack += [(t, False) for t in reversed(node.input_tensors)]
    return order


def _calls_of(layer):
    return list(layer._inbound_nodes), list(layer._outbound_nodes)


def _put_back(layer, calls):
    layer._inbound_nodes, layer._outbound_nodes = calls


def _note(graph, layers):
    """Let operations know the calls of a new graph, and no others that are new."""
    wanted = {id(node) for node in graph}
    operations = {id(n.operation): n.operation for n in graph}
    for operation in [*layers, *operations.values()]:
        # The calls of older graphs come first and stay, so that indices hold.
        operation._outbound_nodes = [
            n for n in operation._outbound_nodes if id(n) not in wanted
        ]
    for node in graph:
        index = node.operation._inbound_nodes.index(node)
        for tensor in node.outputs:
            tensor._keras_history = tensor._keras_history._replace(node_index=index)
        for tensor in node.input_tensors:
            tensor._keras_history.operation._outbound_nodes.append(node)


def _has_own_call(layer):
    """Whether a layer of the user's own calls layers that it holds."""
    if not children(layer) or is_normalization(layer) or computes_otherwise(layer):
        return False
    plain = (keras.Operation, keras.layers.Layer, keras.Model)
    for kind in type(layer).__mro__:
        calls = "call" in vars(kind) or "__call__" in vars(kind)
        if calls and _is_librarys(kind) and kind not in plain:
            return False
    owner = next(k for k in type(layer).__mro__ if "call" in vars(k))
    return owner not in plain and graph_of(layer) is None


def _is_librarys(kind):
    """Whether a class stands in a module of Keras or of this package."""
    package = kind.__module__.partition(".")[0]
    module = sys.modules.get(kind.__module__)
    return (
        package in ("keras", "keras_bn")
        and getattr(module, kind.__name__, None) is kind
    )


def _holds(layer, own):
    """Whether a graph holds layers of the user's own, to any depth."""
    return graph_of(layer) is not None and any(id(la) in own for _, la in walk(layer))


def _why_closed(layer):
    """Why a layer of the user's own is not opened; None if it may be."""
    inner = {id(v) for child in children(layer) for v in child.weights}
    for variable in layer.weights:
        if id(variable) not in inner:
            return f"it has the variable '{variable.path}' of its own"
    if not _is_keras(type(layer).compute_mask):
        return "it has a `compute_mask` of its own"
    if not _is_keras(type(layer).__call__):
        return "it has a `__call__` of its own"
    if layer.activity_regularizer is not None:
        return "it has an activity regularizer"
    if layer.quantization_mode is not None:
        return "it is quantized"
    training = inspect.signature(layer.call).parameters.get("training")
    if training and training.default not in (None, False, inspect.Parameter.empty):
        return "its `call` trains by default"
    return None


def _is_keras(function):
    return function.__module__.partition(".")[0] == "keras"


_LIBRARIES = frozenset(
    ["keras", "keras_bn", "tensorflow", "torch", "jax", "numpy", "optree", "contextlib"]
)


def _refusal(model, why):
    return f"'{model.name}' cannot be a Functional model: {why}."


def _reason(error):
    """An error in a line, with the line of the user's that raised it."""
    text = re.sub("\x1b\\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines()]
    lines = [x for x in lines if x and "Exception encountered" not in x]
    text = lines[0].removesuffix(".") if lines else type(error).__name__
    place = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in _LIBRARIES:
            place = f"{frame.f_code.co_filename}:{number}: "
    return f"{place}{text}"


def _inputs_of(model):
    """New inputs of a model, in the shapes that it was built with.

    Returns:
        `(args, kwargs)` of a call.

    Raises:
        NotAGraphError: if the shapes are not known.
    """
    if graph_of(model) is not None:
        graph = graph_of(model)
        return (
            keras.tree.map_structure(
                lambda t: keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name),
                graph.input,
            ),
        ), {}
    config = model.get_build_config() or {}
    shapes = config.get("shapes_dict") or {"": config.get("input_shape")}
    made = {name.removesuffix("_shape"): _made(shape) for name, shape in shapes.items()}
    if not made or any(value is None for value in made.values()):
        raise NotAGraphError(
            f"'{model.name}' cannot be a Functional model: the shapes that it was "
            "built with are not known. Give `inputs`, or call it on data."
        )
    return ((*made.values(),), {}) if "" in made else ((), made)


def _made(shape, name=None):
    """Inputs of a structure of shapes, of any batch size; None if it is none."""
    if isinstance(shape, dict):
        made = {key: _made(part, key) for key, part in shape.items()}
        return None if any(part is None for part in made.values()) else made
    if not isinstance(shape, list | tuple) or not shape:
        return None
    if all(size is None or isinstance(size, int) for size in shape):
        return keras.Input(shape=shape[1:], name=name)
    parts = [_made(part) for part in shape]
    return None if any(part is None for part in parts) else type(shape)(parts)
