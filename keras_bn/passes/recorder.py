"""Recorders in the place of a model's normalizations.

A recorder is called instead of a layer's `call`, and only in the thread and context of
the pass that it belongs to: elsewhere the model works as always.
"""

import contextlib
import contextvars
import copy
import threading
import types

import keras

from keras_bn.layer import BatchNormalization
from keras_bn.surgery.arrays import restored
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.graph import variables_of, walk
from keras_bn.surgery.rebuild import rebuild

# The recorders by the `id` of the layer, in the present thread and context.
_RECORDERS: contextvars.ContextVar[dict | None] = contextvars.ContextVar(
    "recorders", default=None
)
# By the `id` of a layer: how many passes intercept, and the `call` the user had set.
_INTERCEPTED: dict = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def redirected(recorders):
    """Call these functions, by the `id` of a layer, instead of intercepted layers."""
    token = _RECORDERS.set(recorders)
    try:
        yield
    finally:
        _RECORDERS.reset(token)


@contextlib.contextmanager
def intercepted(layer):
    """Replace the `call` of a layer wherever there is a recorder for it."""

    def call(self, *args, **kwargs):
        recorder = (_RECORDERS.get() or {}).get(id(self))
        _, own = _INTERCEPTED.get(id(self), (0, None))
        return (recorder or own or type(self).call.__get__(self))(*args, **kwargs)

    with _LOCK:
        count, own = _INTERCEPTED.get(id(layer), (0, vars(layer).get("call")))
        _INTERCEPTED[id(layer)] = count + 1, own
        if not count:
            vars(layer)["call"] = types.MethodType(call, layer)
    try:
        yield
    finally:
        with _LOCK:
            count, own = _INTERCEPTED.pop(id(layer))
            if count > 1:
                _INTERCEPTED[id(layer)] = count - 1, own
            elif own is not None:
                vars(layer)["call"] = own
            else:
                del vars(layer)["call"]


def double_of(layer):
    """A `keras_bn` layer with the config of a normalization and a copy of its weights.

    It computes what a recorder gives, so that the layer itself never changes.
    """
    return rebuild(copy_model(layer)[0], BatchNormalization)


def with_values(double, changes=()):
    """A context in which a layer has other values, and calls to it change nothing.

    Args:
        double: a layer.
        changes: pairs of a variable of the layer and a tensor for it.
    """
    values = [(variable, variable.value) for variable in double.variables]
    return keras.StatelessScope([*values, *changes])


@contextlib.contextmanager
def state_kept(model):
    """Restore the state that running a model changes.

    This is random and recurrent state, and the state of metrics.
    """
    variables = [variable for variable in variables_of(model) if not variable.trainable]
    metrics = list(getattr(model, "metrics", []))
    for metric in metrics:
        variables += metric.variables
    # A module of PyTorch has statistics that Keras does not know of.
    modules = [
        (layer.module, copy.deepcopy(layer.module.state_dict()))
        for _, layer in walk(model)
        if isinstance(layer, keras.layers.TorchModuleWrapper)
    ]
    with restored(variables):
        try:
            yield
        finally:
            for module, state in modules:
                module.load_state_dict(state)
            # Keras makes the metrics of a loss when it first computes it.
            for metric in getattr(model, "metrics", []):
                if all(metric is not known for known in metrics):
                    metric.reset_state()
