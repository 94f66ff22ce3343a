"""A model as the content of a file, in which no operation computes in floats."""

import contextlib
from typing import NamedTuple

import keras
import numpy as np

from keras_bn.int8 import tflite
from keras_bn.int8.layers import FakeQuantizedLinear
from keras_bn.int8.measure import MOVES, computed, tagged, through
from keras_bn.surgery.calls import Call
from keras_bn.surgery.graph import graph_of
from keras_bn.surgery.norms import adapts

_MEASURES = (
    " `keras_bn.export_int8` of a model that is not from `keras_bn.quantize_aware` "
    "takes more activations, as hard_sigmoid and softplus, for it measures the ranges "
    "of the values within them."
)


def check_layers(view):
    """Refuse layers that integers cannot compute."""
    for name, layer in view.layers:
        if adapts(layer):
            raise ValueError(
                f"'{name}' follows its inputs, and the scales of integers are fixed. "
                "Call `keras_bn.unadapt(model)` first."
            )
        if getattr(layer, "quantization_mode", None) is not None:
            raise ValueError(
                f"'{name}' is quantized by Keras's `model.quantize`. Export the model "
                "as it was before that."
            )
        if keras.backend.is_float_dtype(layer.compute_dtype or "int32") and (
            layer.compute_dtype != "float32"
        ):
            raise ValueError(
                f"'{name}' computes in {layer.compute_dtype}, and the converter takes "
                "float32. Build the model with the dtype policy 'float32', and load "
                "the weights into it."
            )


@contextlib.contextmanager
def constant(view, trained=False):
    """Have the linear layers of a model compute with constants, as a file does.

    Args:
        view: the `ModelView` of the model.
        trained: whether weights that are all zero are others here, as they will be
            after training: the converter leaves zeros out.
    """
    layers = view.of_type(FakeQuantizedLinear).values()
    try:
        for layer in layers:
            layer.baked = layer.weights_of_inference()
            if trained:
                layer.baked = keras.tree.map_structure(_not_zero, layer.baked)
        yield
    finally:
        for layer in layers:
            layer.baked = None


def _not_zero(values):
    return np.ones_like(values) if values is not None and not values.any() else values


class Names(NamedTuple):
    """The names of the inputs and outputs of a file, in the model's order."""

    inputs: list[str]
    outputs: list[str]


def names_of(model):
    """The `Names` of a model's inputs and outputs, each name once."""
    graph = graph_of(model)

    def once(names):
        unique = []
        for name in names:
            new, number = name, 1
            while new in unique:
                new, number = f"{name}_{number}", number + 1
            unique.append(new)
        return unique

    return Names(once(t.name for t in graph.inputs), once(graph.output_names))


def convert(
    model,
    example,
    samples=None,
    per_channel=True,
    quoted="'{}'".format,
    bits=8,
    keep_float=frozenset(),
    onnx=None,
):
    """The content of a file, with no operation of floats in it but those named.

    Args:
        model: a Functional or Sequential model.
        example: a batch as the file takes it, a list of arrays.
        samples: a list of batches to measure ranges with; None for a model that has
            them.
        per_channel: as in `integer_file`.
        quoted: gives what an error says for the path of a layer.
        bits: of the activations.
        keep_float: a set of paths of the calls that stay in floats; at 16 bits, of
            those that may, where they have no integers.
        onnx: makes an `onnx.Interpreter` of the content, whose file is wanted; None for
            the `.tflite` file.

    Returns:
        `(bytes, Interpreter, floats)`: the last are the paths of those that are.

    Raises:
        ValueError: naming the layers that the converter cannot make integer.
    """
    names = names_of(model)
    inputs = dict(zip(names.inputs, example, strict=True))
    values = [(v, keras.ops.convert_to_numpy(v)) for v in model.variables]
    calls: dict[int, Call] = {}
    last: dict[str, int | None] = {}

    def function(*tensors):
        constants = [(v, keras.ops.convert_to_tensor(a, v.dtype)) for v, a in values]
        with keras.StatelessScope(state_mapping=constants):
            traced = through(model, list(tensors))
        calls.update(traced.calls)
        last.update(zip(names.outputs, traced.last, strict=True))
        return dict(zip(names.outputs, traced.outputs, strict=True))

    def measured():
        return (dict(zip(names.inputs, batch, strict=True)) for batch in samples)

    def with_paths(interpreter):
        """The operations of a file, each with the paths of its calls."""
        operations, tensors = interpreter.operations(), interpreter.outputs()
        ends = {tensors[name]: number for name, number in last.items()}
        every = computed(operations, calls, ends)
        paths = [[calls[number].path for number in numbers] for numbers in every]
        return list(zip(operations, paths, strict=True))

    def in_floats(interpreter):
        return [
            name
            for operation, paths in with_paths(interpreter)
            if not keep_float.isdisjoint(paths)
            for name in operation.outputs
        ]

    advice = _MEASURES if samples is None else " Or name it in `keep_float`."
    try:
        content = tflite.convert(
            function,
            [(name, array.shape, array.dtype.name) for name, array in inputs.items()],
            None if samples is None else measured,
            per_channel,
            bits,
            in_floats if keep_float else None,
        )
    except tflite.ConversionError as error:
        paths = _paths_in(str(error), calls, quoted)
        kept = bool(paths) and {quoted(path) for path in keep_float}.issuperset(paths)
        hint = "" if kept else advice  # not even in floats
        raise refusal(model, paths, error, hint) from error
    try:
        tflite.check_runs(content, inputs)
    except tflite.RunError as error:
        raise ValueError(
            f"TFLite cannot run the file of '{model.name}': {error}."
        ) from error
    try:
        interpreter = tflite.Interpreter(content)
    except RuntimeError as error:
        raise ValueError(
            f"TFLite cannot load the file of '{model.name}': {error}."
        ) from error
    left: dict[str, list[str]] = {}
    floats: dict[str, None] = {}
    for operation, paths in with_paths(interpreter):
        if not _computes_in_floats(operation):
            continue
        if keep_float.isdisjoint(paths):
            left.setdefault(quoted(paths[-1]), []).append(operation.name)
        else:
            floats.update(dict.fromkeys(paths))
    if left:
        parts = [f"{', '.join(names)} of {path}" for path, names in left.items()]
        why = f"it leaves {'; '.join(parts)} in floats"
        raise refusal(model, left, why, advice)
    try:
        interpreter = onnx(content) if onnx else interpreter
    except tflite.ConversionError as error:
        # The tensor of an output is named after the output alone.
        paths = _paths_in(str(error), calls, quoted) or [quoted(calls[max(calls)].path)]
        raise ValueError(
            f"tf2onnx cannot translate {', '.join(paths)} of '{model.name}': {error}. "
            "Replace it by other layers, or write a `.tflite` file."
        ) from error
    return interpreter.content, interpreter, list(floats)


def _paths_in(message, calls, quoted):
    """The paths of the calls that a message names."""
    at = sorted({index for index in tagged(message) if index in calls})
    return [quoted(calls[index].path) for index in at]


def _computes_in_floats(operation):
    floats = any(name.startswith(("float", "complex")) for name in operation.dtypes)
    return floats and operation.name not in MOVES


def refusal(model, paths, why, advice=_MEASURES):
    """The error that says which layers cannot be made integer.

    Args:
        model: the model that has them.
        paths: what the error says for each.
        why: the reason, whose first line that tells of an error is quoted.
        advice: a last sentence; by default that for a model that has its ranges.
    """
    names = ", ".join(paths) or "a layer"
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line] or lines
    return ValueError(
        f"TensorFlow's converter cannot make {names} of '{model.name}' integer: "
        f"{errors[0].rpartition('error: ')[2]}. Replace what it names by other layers, "
        f"or take it out of the model that is exported.{advice}"
    )
