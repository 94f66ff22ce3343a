"""Running data through a model and seeing the Moments at every normalization.

`batches` reads whatever `fit` takes. `Watch` runs a model on them, with a function in
place of the `call` of some normalizations. It does so only in its own thread and
context: elsewhere the model works as always.
"""

import contextlib
import contextvars
import copy
import functools
import threading
import types
import warnings
from typing import Any, Literal

import keras
import numpy as np

from keras_bn.backends import backend
from keras_bn.layer import BatchNormalization
from keras_bn.moments import Moments, merged
from keras_bn.surgery.arrays import float64
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.data import Source
from keras_bn.surgery.graph import walk
from keras_bn.surgery.private import require
from keras_bn.surgery.rebuild import rebuild


class NoDataError(ValueError):
    """Data that has no batch, or none left."""

    def __init__(self) -> None:
        super().__init__("There is no data: not one batch came.")


# As in `fit`; and what it gives callbacks.
Verbose = Literal["auto", 0, 1, 2]
Logs = dict[str, Any] | None


def batches(x, y=None, sample_weight=None, *, steps=None, batch_size=None, verbose=0):
    """The batches of any data that `fit` takes, with a progress bar.

    Args:
        x, y, sample_weight: as in `fit`.
        steps: how many batches to take; None for all.
        batch_size: for arrays; 32 by default.
        verbose: `"auto"`, 0, 1 or 2, as in `fit`.

    Returns:
        An iterator of `(x, y, sample_weight)`; a missing part is None.

    Raises:
        ValueError: for endless data, if `steps` is None.

    Warns:
        UserWarning: if the data ends before `steps` batches.
    """
    epoch: Any
    if hasattr(x, "__next__"):
        source, total, epoch = x, steps, contextlib.nullcontext()
    else:
        source = epoch = Source(x, y, sample_weight, steps, batch_size)
        total = source.total
    verbose = 1 if verbose == "auto" else verbose
    bar = keras.utils.Progbar(total, verbose=verbose, unit_name="step")
    seen = 0
    with epoch:
        # Do not take one batch too many out of a generator.
        for batch in () if total == 0 else source:
            batch = keras.tree.map_structure(_dense, batch)
            yield keras.utils.unpack_x_y_sample_weight(batch)
            seen += 1
            bar.update(seen)
            if seen == total:
                break
    if seen and seen != total:
        bar.update(seen, finalize=True)
    if seen and steps is not None and seen < steps:
        warnings.warn(
            f"The data ended after {seen} batches. Received: steps={steps}",
            stacklevel=2,
        )


def _dense(value):
    """An array for a sparse matrix of SciPy, which `fit` takes too."""
    return value.toarray() if hasattr(value, "toarray") else value


def check_end(data, steps):
    """Refuse endless data without `steps`.

    Raises:
        ValueError: for a generator, or data known to be endless, without `steps`.
    """
    if steps is not None:
        return
    if hasattr(data, "__next__"):
        raise ValueError(
            "A generator goes on from epoch to epoch, so `steps` must say how many "
            "batches to take each time. Received: steps=None"
        )
    Source(*(data if isinstance(data, tuple) else (data,)))


def check_call(model):
    """Refuse a model that data cannot go through, such as the outer one of a GAN.

    Raises:
        ValueError: if its class has no `call`.
    """
    if getattr(type(model), "call", None) is keras.Model.call:
        raise ValueError(
            f"'{model.name}' has no `call`, so data cannot go through it. Pass the "
            "part that has the batch normalizations: callbacks take `model=`."
        )


class DataCallback(keras.callbacks.Callback):
    """A callback that runs data through the fitted model, or through a part of it.

    Args:
        data: as in `keras_bn.recalibrate` or `keras_bn.diagnose`.
        part: the model to run, if it is not the fitted one.
    """

    def __init__(self, data: Any, part: keras.Model | None) -> None:
        tool = f"keras_bn.{type(self).__name__}"
        require(tool, "layers", "graph", "copy", "data")
        super().__init__()
        self._data, self._part = data, part

    @property
    def _target(self):
        return self.model if self._part is None else self._part

    def _check(self, steps):
        """Refuse, when `fit` begins, what could not run later."""
        check_end(self._data, steps)
        check_call(self._target)
        self._warned: set[str] = set()

    def _warn_once(self, reason, message):
        """Warn of what a callback cannot do, instead of ending the training.

        Args:
            reason: the same warning comes once in a `fit`.
            message: text of the warning.
        """
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=3)


class Watch:
    """Runs a model while a function computes some of its normalizations.

    Args:
        model: the model; nothing in it changes.
        layers: the normalizations, by path.
        answer: `answer(path, twin, inputs, training=None, mask=None)` gives the output
            of a call. The twin is a layer of ours with the same weights as the layer
            that was called; the function may change it.

    Attributes:
        twins: the twin of each layer, by path.
    """

    def __init__(self, model, layers, answer):
        self._model = model
        self.twins = {path: twin_of(layer) for path, layer in layers.items()}
        self._answers = {
            id(layer): functools.partial(answer, path, self.twins[path])
            for path, layer in layers.items()
        }
        self._layers = list(layers.values())
        # What is called at each time step has to show its values.
        self._loops = any(isinstance(e, keras.layers.RNN) for _, e in walk(model))

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(state_kept(self._model))
        for layer in self._layers:
            self._stack.enter_context(_listening(layer))
        return self

    def __exit__(self, *error):
        self._stack.close()

    def run(self, x, training=False):
        """The outputs of the model, computed with the answers."""
        token = _ANSWERS.set(self._answers)
        try:
            with backend.recording(self._loops):
                return self._model(x, training=training)
        finally:
            _ANSWERS.reset(token)


def is_watched(layer):
    """Whether a layer called here is answered for: then it has to be called."""
    return id(layer) in (_ANSWERS.get() or {})


# The answers by the `id` of the layer, in the present thread and context.
_ANSWERS: contextvars.ContextVar[dict | None] = contextvars.ContextVar(
    "answers", default=None
)
# By the `id` of a layer: how many passes listen, and the `call` the user had set on it.
_LISTENERS: dict = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def _listening(layer):
    """Replace the `call` of a layer wherever there is an answer for it."""

    def call(self, *args, **kwargs):
        answer = (_ANSWERS.get() or {}).get(id(self))
        _, own = _LISTENERS.get(id(self), (0, None))
        return (answer or own or type(self).call.__get__(self))(*args, **kwargs)

    with _LOCK:
        count, own = _LISTENERS.get(id(layer), (0, vars(layer).get("call")))
        _LISTENERS[id(layer)] = count + 1, own
        if not count:
            vars(layer)["call"] = types.MethodType(call, layer)
    try:
        yield
    finally:
        with _LOCK:
            count, own = _LISTENERS.pop(id(layer))
            if count > 1:
                _LISTENERS[id(layer)] = count - 1, own
            elif own is not None:
                vars(layer)["call"] = own
            else:
                del vars(layer)["call"]


@contextlib.contextmanager
def state_kept(model):
    """Restore the state that running a model changes.

    This is random and recurrent state, and the state of metrics.
    """
    variables = [variable for variable in model.variables if not variable.trainable]
    metrics = list(getattr(model, "metrics", []))
    for metric in metrics:
        variables += metric.variables
    before = [keras.ops.convert_to_numpy(variable) for variable in variables]
    # A module of PyTorch has statistics that Keras does not know of.
    modules = [
        (layer.module, copy.deepcopy(layer.module.state_dict()))
        for _, layer in walk(model)
        if isinstance(layer, keras.layers.TorchModuleWrapper)
    ]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        for module, state in modules:
            module.load_state_dict(state)
        # Keras makes the metrics of a loss when it first computes it.
        for metric in getattr(model, "metrics", []):
            if all(metric is not known for known in metrics):
                metric.reset_state()


def twin_of(layer):
    """A layer of ours with the config of a normalization, and a copy of its weights."""
    return rebuild(copy_model(layer)[0], BatchNormalization)


def observed(path, twin, inputs, mask):
    """A batch normalized by its own statistics, and these statistics.

    Args:
        path: the path of the layer, for messages.
        twin: its twin.
        inputs, mask: the arguments of the call.

    Returns:
        `(outputs, Moments)`: the moments in float64. The count is 0 in a channel that
        is not finite.

    Raises:
        ValueError: inside a function that is being compiled.
    """
    outputs, moments = twin.normalize_batch(inputs, mask)
    try:
        count, mean, variance = map(float64, moments)
    except (NotImplementedError, TypeError):  # of TensorFlow, of JAX
        raise ValueError(
            f"'{path}' is called inside a compiled function, where its statistics "
            "cannot be had. Call the layers of the model directly in it."
        ) from None
    finite = np.isfinite(mean) & np.isfinite(variance)
    return outputs, Moments(np.where(finite, count, 0.0), mean, variance)


def pooled(first, second):
    """The merged moments, in float64; the first may be None."""
    # Not by `keras.ops`: JAX has no float64.
    return second if first is None else merged(first, second, np)
