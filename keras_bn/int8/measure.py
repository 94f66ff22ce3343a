"""Int8 against float: the same samples through a file and through models."""

import collections
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_bn.int8 import tflite
from keras_bn.int8.report import Int8Layer
from keras_bn.int8.samples import at_once
from keras_bn.surgery.calls import run


class Traced(NamedTuple):
    """What a model computes, call by call."""

    outputs: list  # of the model
    last: list  # the number of the call that gives each of them, or None
    calls: dict  # the calls, by number
    values: dict  # the output of each that has one of floats, by number


def through(model, inputs):
    """Run a model in inference, each call in a scope that names it; a `Traced`."""
    traced = Traced([], [], {}, {})
    numbers: dict[int, int] = {}

    def around(call, compute):
        traced.calls[call.number] = call
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


def check_finite(model, samples):
    """Refuse a model whose values on samples are not finite: int8 has no such range."""
    calls = {}

    def function(inputs):
        traced = through(model, inputs)
        calls.update(traced.calls)
        return traced.values

    _, together = next(at_once(samples))
    for number, value in sorted(tflite.compiled(function)(together).items()):
        if not np.isfinite(value).all():
            # Padding is at the same places in all samples and channels.
            places = np.isneginf(value).all((0, -1))
            padded = places.any() and not places.all()
            hint = " Let the pooling pad: `padding='same'`." if padded else ""
            raise ValueError(not_finite(calls[number].path) + hint)


def not_finite(path):
    """The sentence that says whose values are not finite."""
    return f"The values at '{path}' are not finite, so int8 has no range for them."


def compare(file, original, reference, samples):
    """The errors of the outputs of a `File`, by name, and a list of `Int8Layer`.

    Its outputs are compared with those of the model `original`, its layers with those
    of `reference`, which has the calls of the model that was converted.
    """
    outputs_of = tflite.compiled(lambda inputs: through(original, inputs).outputs)
    values_of = tflite.compiled(lambda inputs: through(reference, inputs).values)
    names, places, value_of = file.outputs, file.places(), file.interpreter.value
    sums: dict[Any, Any] = collections.defaultdict(float)
    for chunk, together in at_once(samples):
        expected = dict(zip(names, outputs_of(together), strict=True))
        expected |= values_of(together)
        for i, batch in enumerate(chunk):
            values = dict(zip(names, file(batch), strict=True))
            values |= {n: value_of(place.tensor) for n, place in places.items()}
            for key, value in values.items():
                part = np.split(expected[key], len(chunk))[i]
                if value.size == part.size:
                    sums[key] += _sums(value, part)
    errors = {key: _error(*each) for key, each in sums.items()}
    layers = [
        Int8Layer(
            file.paths[place.first],
            file.paths[number],
            place.operation,
            errors[number],
            _added(errors[number], {errors.get(i, 0.0) for i in place.before}),
        )
        for number, place in places.items()
        if number in errors
    ]
    layers.sort(key=lambda layer: -np.nan_to_num(layer.error, nan=np.inf))
    return {name: errors[name] for name in names}, layers


def _sums(value, expected):
    """What the error is made of: sums over the elements of two arrays of one size."""
    value, expected = (np.asarray(v, "float64").ravel() for v in (value, expected))
    squares = np.square(value - expected).sum(), np.square(expected).sum()
    return np.array([value.size, expected.sum(), *squares])


def _error(count, total, squares, total_squares):
    """Root mean square over standard deviation."""
    spread = max(total_squares / count - (total / count) ** 2, 0.0)
    return float(np.sqrt(squares / count / (spread or 1.0)))


def _added(error, before):
    """The part of an error that was not in the inputs; errors add up by squares."""
    return float(np.sqrt(np.maximum(error**2 - max(before, default=0.0) ** 2, 0.0)))
