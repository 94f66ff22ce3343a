"""Which models have compiled a layer, so that they compile it again when it changes.

What a compiled function reads of a layer's attributes is fixed while it is traced. Then
the methods of the models that it belongs to are on the stack: `fit` calls `train_step`,
and that calls the model and the layer. So a traced layer knows its models, and changing
one of its options need not search for them.
"""

import inspect
import weakref
from collections.abc import Iterable

import keras

# The layers in the compiled functions of each model.
_layers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def remember(layer: keras.Layer) -> None:
    """Note which models trace a layer: those whose methods are on the stack."""
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            # Not isinstance(), which reads `__class__`: lazy modules then import.
            if issubclass(type(owner), keras.Model):
                _layers.setdefault(owner, weakref.WeakSet()).add(layer)
        frame = frame.f_back


def forget(layers: Iterable[keras.Layer]) -> None:
    """Let every model that has compiled one of these layers compile its steps again.

    Their next step does. It does not change a `tf.function` of the user's own.
    """
    changed = set(layers)
    for model, compiled in list(_layers.items()):
        if not changed.isdisjoint(compiled):
            compiled.clear()
            renew(model)


def renew(model: keras.Model) -> None:
    """Let a model compile its steps again."""
    for name in ("train", "test", "predict"):
        # Not set to None: a running `fit` calls it again at once.
        if getattr(model, f"{name}_function", None) is not None:
            getattr(model, f"make_{name}_function")(force=True)
