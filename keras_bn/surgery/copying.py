"""Copying models object by object.

A config does not contain everything: functions of the user's, constructor arguments,
LoRA weights, an optimizer's state. So this copies the objects themselves, as
`copy.deepcopy` does. The copy gets new variables, only the calls of copied layers, and
no traced functions.
"""

import collections
import copy
import functools
import types
from typing import Any

import keras
import numpy as np

from keras_bn.surgery.exchange import (
    is_wrapped,
    note_nodes,
    plain_dict,
    refresh_parameters,
    rekey,
    retrack,
)
from keras_bn.surgery.graph import is_of_workers, scope_of_copies
from keras_bn.surgery.private import Node, SymbolicArguments, Tracker
from keras_bn.surgery.view import ModelView

# These are always copied; other objects only if one of these can be reached from them.
_COPIED = (
    keras.Operation,
    keras.metrics.Metric,
    keras.losses.Loss,
    keras.optimizers.Optimizer,
    keras.KerasTensor,
    keras.Variable,
    keras.random.SeedGenerator,
    Node,
    SymbolicArguments,
    Tracker,
)
_TRACED = ("train_function", "test_function", "predict_function")
# What `compile` sets; before it, the first are missing and the second None.
_COMPILED = ("optimizer", "_compile_config", "_compiled_trainable_state")
_COMPILED_OR_NONE = ("loss", "_compile_loss", "_compile_metrics", "_loss_tracker")
# Methods that Keras wraps for each layer.
_WRAPPED = ("build", "quantize")


def copy_model(model, compiled=True, view=None):
    """A copy of a model or layer, with its own variables.

    Args:
        model: any Keras layer or model, built or not.
        compiled: whether to copy its compilation, with the state of the optimizer.
        view: the `ModelView` of the model, if there is one already.

    Returns:
        `(copy, of)`: the copy, and a function from each layer to its copy.
    """
    copier = _Copier(view or ModelView(model), compiled)
    with scope_of_copies(model):
        return copier.whole(model), copier


class _Copier:
    """Gives the copy of each object; the same copy every time.

    This restates what `copy.deepcopy` decides by the kind of an object, for four
    reasons. `deepcopy` goes into each object that it meets, and a graph of Keras is a
    chain of calls, tensors and layers, which ends at Python's limit of recursion from
    some hundred layers on: here objects are made first and filled later, from a queue.
    It copies a function as the function itself, with the original's layers in its
    closure. It copies all that can be reached: calls of the same layers by other
    models, traced functions, and what holds nothing of Keras's and may be large or
    unable to be copied, as a tokenizer or a lock. And a variable, a tensor of PyTorch
    with a gradient and the dicts of TensorFlow's tracking need constructors of their
    own. Classes can say how they are copied (`__deepcopy__`), but these are Keras's,
    TensorFlow's and the user's.
    """

    def __init__(self, view, compiled):
        self._copies: dict = {}
        self._unfilled: collections.deque = collections.deque()
        self._nodes = {
            id(node)
            for layer in view.holders
            for graph in (layer, *layer._tracker.config["layers"][1])
            for nodes in getattr(graph, "_nodes_by_depth", {}).values()
            for node in nodes
        }
        self._uncompiled = None if compiled else view.model

    def whole(self, model):
        whole = self(model)
        while self._unfilled:
            self._unfilled.popleft()()
        for original, new in list(self._copies.values()):
            self._mend(original, new)
        return whole

    def __call__(self, value):
        """The copy of an object; the object itself if it holds nothing of Keras's."""
        if id(value) not in self._copies:
            # Keep the original alive, so that no other object gets its `id`.
            self._copies[id(value)] = value, self._made(value)
        return self._copies[id(value)][1]

    def _made(self, value):
        kind = type(value)
        if isinstance(value, keras.Variable):
            return self._variable(value)
        if isinstance(value, keras.KerasTensor) and not self._is_inside(value):
            return value
        if isinstance(value, _COPIED):
            return self._object(value)
        if _is_strategy(value):
            return _strategy_of_copies(value)
        if _is_plain_variable(value):
            known = {"trainable": value.trainable, "name": value.name.split(":")[0]}
            return kind(value.numpy(), **known)
        if issubclass(kind, np.ndarray):
            return value.copy()
        if _is_torch_tensor(value):
            return copy.deepcopy(value.detach() if value.grad_fn else value)
        if _is_torch_module(value):
            return self._module(value)
        if issubclass(kind, tuple | frozenset):
            return self._fixed(value)
        if issubclass(kind, list | dict | set | collections.deque):
            return self._container(value)
        if is_wrapped(value):
            return kind(self._now(value.__wrapped__))
        if not _leads_to_keras(value):
            return value
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self(value.__self__))
        if kind is functools.partial:
            args, kwargs = self._now(value.args), self._now(value.keywords)
            return functools.partial(self(value.func), *args, **kwargs)
        if kind is types.FunctionType:
            return self._function(value)
        if hasattr(value, "python_function"):  # of `tf.function`
            from keras_bn.backends.tensorflow.private import copy_function

            return copy_function(value, self(value.python_function))
        return self._object(value)

    def _is_inside(self, tensor):
        """Whether a symbolic tensor belongs to a graph that is copied."""
        history = getattr(tensor, "_keras_history", None)
        if history is None or history.operation is None:
            return True
        made = history.operation._inbound_nodes
        index = history.node_index
        return index < len(made) and id(made[index]) in self._nodes

    def _is_in(self, part):
        """Whether a part of a list is copied with it: calls by other models are not.

        A layer lists its calls in all graphs, and TensorFlow's tracking notes that list
        in further attributes.
        """
        return not isinstance(part, Node) or id(part) in self._nodes

    def _variable(self, value):
        options = {
            "dtype": value.dtype,
            "trainable": value.trainable,
            "name": value.name,
        }
        for name in ("aggregation", "synchronization"):
            if hasattr(value, name):  # from Keras 3.12 on
                options[name] = getattr(value, name)
        if value._value is None:
            return value
        new = type(value)(_array(value), **options)
        own = {"_value", "_shape", "_ndim"}
        vars(new).update({k: v for k, v in vars(value).items() if k not in own})
        if _is_torch_tensor(value._value):
            new._value = self(value._value)  # a module may hold it too
        return new

    def _module(self, value):
        """A module of PyTorch that is no layer, with the parameters of the copies."""
        layers = [m for m in value.modules() if isinstance(m, keras.layers.Layer)]
        held = [*value.parameters(), *value.buffers(), *layers]
        try:
            return copy.deepcopy(value, {id(each): self(each) for each in held})
        except RuntimeError as error:  # of a tensor that was computed from others
            raise ValueError(
                f"The PyTorch module {type(value).__name__} cannot be copied: {error}. "
                "Convert the model with `in_place=True`."
            ) from error

    def _object(self, value):
        kind = type(value)
        layer = isinstance(value, keras.layers.Layer)
        new = keras.layers.Layer.__new__(kind) if layer else object.__new__(kind)
        self._unfilled.append(functools.partial(self._fill, value, new))
        return new

    def _fill(self, value, new):
        attributes = dict(vars(value))
        if isinstance(value, keras.layers.Layer):
            for name in _WRAPPED:
                attributes.pop(name, None)
        if isinstance(value, keras.Model):
            attributes.update(dict.fromkeys(_TRACED))
            if value is self._uncompiled:
                for name in _COMPILED:
                    attributes.pop(name, None)
                attributes.update(dict.fromkeys(_COMPILED_OR_NONE), compiled=False)
        for name, attribute in attributes.items():
            vars(new)[name] = self(attribute)

    def _fixed(self, value):
        parts = [self(part) for part in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        kind = type(value)
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)

    def _container(self, value):
        kind: Any = type(value)
        new = kind.__new__(kind)
        if isinstance(value, collections.defaultdict):
            new.default_factory = value.default_factory

        def fill():
            if issubclass(kind, dict):
                base = plain_dict(kind)
                for key, part in list(base.items(value)):
                    base.__setitem__(new, self(key), self(part))
            elif issubclass(kind, set):
                set.update(new, [self(part) for part in value])
            elif issubclass(kind, list):
                parts = [part for part in list.__iter__(value) if self._is_in(part)]
                list.extend(new, map(self, parts))
            else:
                new.extend(self(part) for part in value)
            for name, attribute in getattr(value, "__dict__", {}).items():
                vars(new)[name] = self(attribute)

        self._unfilled.append(fill)
        return new

    def _now(self, value):
        """A copy of a dict or tuple that is filled at once."""
        if isinstance(value, dict):
            return {self(key): self(part) for key, part in value.items()}
        return tuple(self(part) for part in value)

    def _function(self, value):
        """The same function, with copies in its closure and its defaults."""
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        new = types.FunctionType(
            value.__code__,
            value.__globals__,
            value.__name__,
            self(value.__defaults__),
            cells,
        )
        new.__kwdefaults__ = self(value.__kwdefaults__)
        new.__qualname__, new.__module__ = value.__qualname__, value.__module__
        vars(new).update(vars(value))

        def fill():
            for cell, old in zip(cells, value.__closure__ or (), strict=True):
                if _is_filled(old):
                    cell.cell_contents = self(old.cell_contents)

        self._unfilled.append(fill)
        return new

    def _mend(self, original, new):
        """Update what depends on the `id` of objects or on their order."""
        if new is original:
            return
        if isinstance(new, Tracker):
            retrack(new)
        elif isinstance(new, Node):
            index = new.operation._inbound_nodes.index(new)
            for i, tensor in enumerate(new.outputs):
                if hasattr(tensor, "_keras_history"):
                    history = tensor._keras_history
                    tensor._keras_history = type(history)(new.operation, index, i)
        elif hasattr(new, "_nodes_by_depth"):
            note_nodes(new)
        elif hasattr(new, "_var_key"):
            self._rekey(new)
        if isinstance(new, keras.layers.Layer):
            refresh_parameters(new)

    def _rekey(self, new):
        """Give a copied optimizer the keys of the copied variables."""
        pairs = self._copies.values()
        rekey(new, [pair for pair in pairs if isinstance(pair[0], keras.Variable)])


def _leads_to_keras(value):
    """Whether something of Keras's can be reached from an object."""
    seen, waiting = set(), [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, _COPIED) or _is_plain_variable(each):
            return True
        if _is_torch_module(each):
            return True
        skipped = isinstance(each, type | types.ModuleType) or _is_strategy(each)
        if id(each) in seen or skipped:
            continue
        seen.add(id(each))
        waiting += _parts(each)
    return False


def _is_strategy(value):
    """Whether a value is a distribution strategy."""
    return hasattr(type(value), "num_replicas_in_sync")


def _strategy_of_copies(strategy):
    """The strategy of copies: the same; of workers, the present one."""
    if not is_of_workers(strategy):
        return strategy
    from keras_bn.backends.tensorflow import context

    return context.present_strategy()


def _array(variable):
    """The value of a variable; the share of this process, where workers add it up.

    So they do with the state of metrics, and each waits for all to read it.
    """
    strategy: Any = getattr(variable._value, "distribute_strategy", None)
    shared = getattr(variable, "synchronization", None) == "on_read"
    if not shared or not is_of_workers(strategy):
        return keras.ops.convert_to_numpy(variable)
    shares = map(np.asarray, strategy.experimental_local_results(variable._value))
    return sum(shares) if variable.aggregation == "sum" else next(shares)


def _is_torch_tensor(value):
    return hasattr(type(value), "grad_fn")


def _is_torch_module(value):
    """Whether a value is a module of PyTorch, as in a `TorchModuleWrapper`."""
    kind = type(value)
    return hasattr(kind, "named_buffers") and not issubclass(kind, keras.layers.Layer)


def _is_plain_variable(value):
    """Whether a value is a TensorFlow variable that Keras did not make."""
    return type(value).__name__ == "ResourceVariable"


def _parts(value):
    """The objects that the copy of an object would copy next."""
    kind = type(value)
    if issubclass(kind, dict):
        return [*dict.keys(value), *dict.values(value)]
    if issubclass(kind, list | tuple | set | frozenset | collections.deque):
        return list(value)
    if kind is types.MethodType:
        return [value.__self__]
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind is types.FunctionType:
        held = [c.cell_contents for c in value.__closure__ or () if _is_filled(c)]
        return [*held, value.__defaults__, value.__kwdefaults__]
    if hasattr(value, "python_function"):
        return [value.python_function]
    return list(getattr(value, "__dict__", {}).values())


def _is_filled(cell):
    try:
        cell.cell_contents  # noqa: B018 (an empty one raises)
    except ValueError:
        return False
    return True
