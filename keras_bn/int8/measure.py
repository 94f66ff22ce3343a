"""Int8 against float: the same samples through a file and through models."""

import re
from typing import NamedTuple

import keras
import numpy as np

from keras_bn.int8 import tflite
from keras_bn.int8.layers import FakeQuantizedLinear
from keras_bn.int8.report import Int8Layer
from keras_bn.int8.samples import at_once
from keras_bn.surgery.calls import run
from keras_bn.tools.linear import is_linear

_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
# Between integers of other scales, or between these and floats.
MOVES = ("QUANTIZE", "DEQUANTIZE")
_TAG = re.compile(r"\bcall(\d+)/")


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
    places: dict[int, _Place] = {}
    of_original, of_converted = _Floats(original), _Floats(converted)
    for chunk, together in at_once(samples):
        expected, _ = of_original(together)
        _, values = of_converted(together)
        calls = of_converted.calls
        if not places:
            places = _places(interpreter, outputs, of_converted.last, calls, values)
        for i, batch in enumerate(chunk):
            _run(interpreter, dict(zip(inputs, batch, strict=True)), calls)
            tensors = interpreter.outputs()
            for name, y in zip(outputs, expected, strict=True):
                part = np.split(y, len(chunk))[i]
                of_outputs.add(name, interpreter.value(tensors[name]), part)
            for index, place in places.items():
                part = np.split(values[index], len(chunk))[i]
                value = interpreter.value(place.tensor)
                if value.size == part.size:
                    of_calls.add(index, value, part)
    calls = of_converted.calls
    errors = {index: of_calls.of(index) for index in of_calls}
    layers = [
        Int8Layer(
            calls[places[index].first].path,
            calls[index].path,
            places[index].operation,
            error,
            _added(error, [errors.get(i, 0.0) for i in places[index].before]),
        )
        for index, error in errors.items()
    ]
    layers.sort(key=lambda layer: -np.nan_to_num(layer.error, nan=np.inf))
    return {name: of_outputs.of(name) for name in outputs}, layers


def _added(error, before):
    """The part of an error that was not in the inputs; errors add up by squares."""
    return float(np.sqrt(np.maximum(error**2 - max(before, default=0.0) ** 2, 0.0)))


def check_finite(model, samples):
    """Refuse a model whose values are not finite somewhere: int8 has no range for them.

    Args:
        model: a Functional or Sequential model.
        samples: list of batches, each a list of arrays, one for each input.

    Raises:
        ValueError: naming the layer.
    """
    floats = _Floats(model)
    _, together = next(at_once(samples))
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


class Traced(NamedTuple):
    """What a model computes, call by call.

    Args:
        outputs: of the model, a list.
        last: the number of the call that gives each of them, or None.
        calls: the calls, by number.
        inputs: the first tensor that each is given, by number.
        values: the output of each that has one of floats, by number.
    """

    outputs: list
    last: list
    calls: dict
    inputs: dict
    values: dict


def through(model, inputs):
    """Run a model in inference, each call in a scope that names it; a `Traced`."""
    traced = Traced([], [], {}, {}, {})
    numbers: dict[int, int] = {}

    def around(call, compute):
        traced.calls[call.number] = call
        tensors = keras.tree.flatten((compute.args, compute.keywords))
        traced.inputs[call.number] = next(filter(keras.ops.is_tensor, tensors), None)
        with tflite.scope(f"call{call.number}"):  # a layer's name may be no scope
            outputs = compute()
        flat = keras.tree.flatten(outputs)
        numbers.update((id(y), call.number) for y in flat)
        if len(flat) == 1 and keras.backend.is_float_dtype(
            keras.backend.standardize_dtype(flat[0].dtype)
        ):
            traced.values[call.number] = flat[0]
        return outputs

    outputs = run(model, inputs, around)
    return traced._replace(outputs=outputs, last=[numbers.get(id(y)) for y in outputs])


class _Floats:
    """Runs a model in floats, and shows the output of each call.

    Called with a list of arrays, it gives the outputs of the model, a list of arrays,
    and those of its calls, by number: of each with one output of floats.

    Attributes:
        calls: all calls, by number.
        last: the number of the call that gives each output of the model, or None.
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
        outputs, self.last, self.calls, _, values = through(model, inputs)
        return outputs, values


def computed(operations, calls, ends):
    """The numbers of the calls that each operation of a file computes, in order.

    Args:
        operations: list of `tflite.Operation`.
        calls: the calls in the file, by number.
        ends: the number of the call that gives an output, by the index of its tensor.
    """
    every: list[list[int]] = []
    following = [max(calls)]
    for operation in reversed(operations):
        named = {i for name in operation.outputs for i in tagged(name) if i in calls}
        named |= {ends[i] for i in operation.tensors if ends.get(i) in calls}
        # What has no name of its own belongs to what comes after it.
        following = sorted(named) or following
        every.insert(0, list(following))
    seen: set[int] = set()
    for operation, numbers in zip(operations, every, strict=True):
        if operation.name in _WEIGHTED and not any(
            _has_weights(calls[i]) for i in numbers
        ):
            # The tensor of an output is named after the output alone.
            before = [i for i in calls if i < numbers[-1] and _has_weights(calls[i])]
            numbers[:0] = [i for i in before if i not in seen][-1:]
        seen.update(numbers)
    return every


class _Place(NamedTuple):
    """Where the output of a call is in a file.

    Args:
        tensor: its index.
        operation: the name of the operation.
        first: the number of the call that has weights in it, if one has.
        before: the numbers of the calls whose outputs it reads.
    """

    tensor: int
    operation: str
    first: int
    before: set[int]


def _places(interpreter, outputs, last, calls, shown):
    """The `_Place` of each call that has a tensor of its own, by its number.

    Args:
        interpreter: the `Interpreter` of the file.
        outputs: the names of the outputs.
        last: the number of the call that gives each of them, or None.
        calls: the calls, by number.
        shown: the numbers of those that are wanted.
    """
    tensors, operations = interpreter.outputs(), interpreter.operations()
    ends = {tensors[name]: n for name, n in zip(outputs, last, strict=True)}
    places: dict[int, _Place] = {}
    inside: set[int] = set()
    for operation, numbers in zip(
        operations, computed(operations, calls, ends), strict=True
    ):
        *before, number = numbers
        if operation.name in MOVES and number in places:
            continue
        first = next((i for i in numbers if _has_weights(calls[i])), number)
        inside.update(before)
        # Of the operations of one call, the last gives its output.
        places[number] = _Place(operation.tensors[-1], operation.name, first, set())
    # What was merged into an operation of a later call has no tensor of its own.
    places = {i: p for i, p in places.items() if i in shown and i not in inside}
    made = {place.tensor: number for number, place in places.items()}
    comes_from: dict[int, set[int]] = {}
    for operation in operations:
        before = set().union(*(comes_from.get(i, set()) for i in operation.inputs))
        for tensor in operation.tensors:
            comes_from[tensor] = {made[tensor]} if tensor in made else before
            if tensor in made:
                places[made[tensor]].before.update(before)
    return places


def _has_weights(call):
    wrapped = isinstance(call.operation, FakeQuantizedLinear)
    return wrapped or is_linear(call.operation)
