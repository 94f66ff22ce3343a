"""Int8 against float: the same samples through a file and through models."""

import re

import keras
import numpy as np

from keras_bn.int8 import tflite
from keras_bn.int8.layers import FakeQuantizedLinear
from keras_bn.int8.report import Int8Layer
from keras_bn.surgery.calls import run
from keras_bn.tools.linear import is_linear

# Samples that go through a model of floats at once.
_CHUNK = 8
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
_TAG = re.compile(r"\bcall(\d+)/")


def tag(call):
    """The name scope of a call, which names of tensors in the file then contain."""
    return f"call{call.number}"


def tagged(name):
    """The indices of the calls that the name of a tensor, or a message, names."""
    return [int(index) for index in _TAG.findall(name)]


class Errors:
    """Sums for root mean square over standard deviation, by key."""

    def __init__(self):
        self._sums = {}

    def add(self, key, value, expected):
        """Take in arrays of one size, of int8 and of float."""
        value, expected = (np.asarray(v, "float64").ravel() for v in (value, expected))
        new = (
            value.size,
            np.square(value - expected).sum(),
            expected.sum(),
            np.square(expected).sum(),
        )
        old = self._sums.get(key, np.zeros(4))
        self._sums[key] = old + np.array(new)

    def of(self, key):
        """The error of a key."""
        count, squares, total, total_squares = self._sums[key]
        spread = max(total_squares / count - (total / count) ** 2, 0.0)
        return float(np.sqrt(squares / count / (spread or 1.0)))

    def __iter__(self):
        return iter(self._sums)


def compare(interpreter, original, converted, samples, names):
    """The errors of the outputs and of the layers.

    Args:
        interpreter: the `Interpreter` of the file.
        original: the model of floats that the outputs are compared with.
        converted: the model of floats that the layers are compared with. The calls
            in the file are named after its calls.
        samples: list of batches, each a list of arrays, one for each input.
        names: `(inputs, outputs)`: the names in the file, in the models' order.

    Returns:
        `(outputs, layers)`: dict of errors by name, and list of `Int8Layer`.
    """
    inputs, outputs = names
    of_outputs, of_calls = Errors(), Errors()
    places: dict[int, tuple] = {}
    of_original, of_converted = _Floats(original), _Floats(converted)
    for at in range(0, len(samples), _CHUNK):
        chunk = samples[at : at + _CHUNK]
        together = [np.concatenate(arrays) for arrays in zip(*chunk, strict=True)]
        expected, _ = of_original(together)
        _, values = of_converted(together)
        calls = of_converted.calls
        places = places or _places(interpreter, outputs, of_converted.last, calls)
        for i, batch in enumerate(chunk):
            _run(interpreter, dict(zip(inputs, batch, strict=True)), calls)
            tensors = interpreter.outputs()
            for name, y in zip(outputs, expected, strict=True):
                part = np.split(y, len(chunk))[i]
                of_outputs.add(name, interpreter.value(tensors[name]), part)
            for index, (tensor, *_) in places.items():
                part = np.split(values[index], len(chunk))[i]
                value = interpreter.value(tensor)
                if value.size == part.size:
                    of_calls.add(index, value, part)
    calls = of_converted.calls
    layers = [
        Int8Layer(
            calls[places[index][2]].path,
            calls[index].path,
            places[index][1],
            of_calls.of(index),
        )
        for index in of_calls
    ]
    layers.sort(key=lambda layer: -np.nan_to_num(layer.error, nan=np.inf))
    return {name: of_outputs.of(name) for name in outputs}, layers


def check_finite(model, samples):
    """Refuse a model whose values are not finite somewhere: int8 has no range for them.

    Args:
        model: a Functional or Sequential model.
        samples: list of batches, each a list of arrays, one for each input.

    Raises:
        ValueError: naming the layer.
    """
    floats = _Floats(model)
    together = [
        np.concatenate(arrays) for arrays in zip(*samples[:_CHUNK], strict=True)
    ]
    _, values = floats(together)
    for number, value in sorted(values.items()):
        if not np.isfinite(value).all():
            padded = np.isneginf(value).any() and np.isfinite(value).any()
            hint = " Let the pooling pad: `padding='same'`." if padded else ""
            raise ValueError(not_finite(floats.calls[number].path) + hint)


def not_finite(path):
    """The sentence that says whose values are not finite."""
    return f"The values at '{path}' are not finite, so int8 has no range for them."


def _run(interpreter, inputs, calls):
    """Run one batch; an operation that fails is one of a layer."""
    try:
        interpreter.run(inputs)
    except tflite.RunError as error:
        names = error.operation.outputs if error.operation else ()
        tags = [i for name in names for i in tagged(name) if i in calls]
        path = calls[max(tags or calls)].path
        raise ValueError(
            f"TFLite cannot run '{path}' in int8 on these samples: {error}"
        ) from error


class _Floats:
    """Runs a model in floats, and shows the output of each call.

    Called with a list of arrays, it gives the outputs of the model, a list of arrays,
    and those of its calls, by index: of each with one output of floats.

    Attributes:
        calls: these calls, by index.
        last: the index of the call that gives each output of the model; None for a
            call that is not among them.
    """

    def __init__(self, model):
        self.calls, self.last = {}, []
        self._function = tflite.graph(lambda *inputs: self._run(model, list(inputs)))

    def __call__(self, inputs):
        return keras.tree.map_structure(
            keras.ops.convert_to_numpy,
            self._function(*map(keras.ops.convert_to_tensor, inputs)),
        )

    def _run(self, model, inputs):
        values, numbers = {}, {}

        def around(call, compute):
            with tflite.scope(tag(call)):  # the name of a layer may be no root scope
                outputs = compute()
            flat = keras.tree.flatten(outputs)
            dtypes = [keras.backend.standardize_dtype(y.dtype) for y in flat]
            if len(flat) == 1 and keras.backend.is_float_dtype(dtypes[0]):
                self.calls[call.number], values[call.number] = call, flat[0]
                numbers[id(flat[0])] = call.number
            return outputs

        outputs = run(model, inputs, around)
        self.last = [numbers.get(id(y)) for y in outputs]
        return outputs, values


def _places(interpreter, outputs, last, calls):
    """Where the output of a call is in the file.

    Returns:
        A dict from the index of the call to the index of the tensor, the name of the
        operation, and the index of the call that has weights in it, if one has.
    """
    ends = {
        tensor: index
        for name, index in zip(outputs, last, strict=True)
        for tensor in [interpreter.outputs()[name]]
        if index is not None
    }
    places: dict[int, tuple] = {}
    inside: set[int] = set()
    for operation in interpreter.operations():
        for name, tensor in zip(operation.outputs, operation.tensors, strict=True):
            parts = tagged(name)
            if tensor in ends:
                parts.append(ends[tensor])
            if not parts or max(parts) not in calls:
                continue
            index = max(parts)
            weighted = [i for i in parts if i in calls and _has_weights(calls[i])]
            if not weighted and operation.name in _WEIGHTED:
                # The tensor of an output is named after the output alone.
                weighted = _unplaced(calls, index, places)
            first = min(weighted, default=index)
            inside.update(i for i in parts if i != index)
            # Of the operations of one call, the last gives its output.
            places[index] = tensor, operation.name, first
    # What was merged into an operation of a later call has no tensor of its own.
    return {index: place for index, place in places.items() if index not in inside}


def _unplaced(calls, before, places):
    """The last call with weights before an index that has no place yet."""
    weighted = [i for i, call in calls.items() if i < before and _has_weights(call)]
    return [i for i in weighted if i not in places][-1:]


def _has_weights(call):
    wrapped = isinstance(call.operation, FakeQuantizedLinear)
    return wrapped or is_linear(call.operation)
