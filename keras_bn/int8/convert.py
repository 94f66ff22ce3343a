"""A model as a file, in which no operation computes in floats but those named."""

import contextlib
import re
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_bn.int8 import onnx, tflite
from keras_bn.int8.layers import FakeQuantizedLinear
from keras_bn.int8.measure import through
from keras_bn.surgery.calls import check_graph
from keras_bn.surgery.graph import graph_of
from keras_bn.surgery.norms import adapts
from keras_bn.tools.linear import is_linear

_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
# Between integers of other scales, or between these and floats.
_MOVES = ("QUANTIZE", "DEQUANTIZE")

# With 16 bits, ranges are also measured on samples this many times as large: values
# beyond a range are cut off, and there are bits to spare.
_ROOM = np.float32(1.5)

_MEASURES = (
    " `keras_bn.export_int8` of a model that is not from `keras_bn.quantize_aware` "
    "takes more activations, as hard_sigmoid and softplus, for it measures the ranges "
    "of the values within them."
)


def check_layers(view):
    """Refuse a model whose calls are not known, or that integers cannot compute."""
    check_graph(view)
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
        dtype = layer.compute_dtype or "float32"
        if keras.backend.is_float_dtype(dtype) and dtype != "float32":
            raise ValueError(
                f"'{name}' computes in {dtype}, and the converter takes "
                "float32. Build the model with the dtype policy 'float32', and load "
                "the weights into it."
            )


@contextlib.contextmanager
def constant(view, trained=False):
    """Have the linear layers of a model compute with constants, as a file does.

    Weights that are all zero may be others here, as they will be after training
    (`trained`): the converter leaves zeros out.
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


class Place(NamedTuple):
    """Where the output of a call is in a file."""

    tensor: int  # its index
    operation: str  # the name of the operation
    first: int  # the number of the call that has weights in it, if one has
    before: set[int]  # the numbers of the calls whose outputs it reads


class File:
    """A file that an interpreter runs, and what it computes of a model.

    Args:
        interpreter: of TFLite or of ONNX.
        inputs, outputs: the names of its inputs and outputs, in the model's order.
        traced: the `Traced` of the model.

    Attributes:
        paths: those of the calls, by number.
        operations: pairs of a `tflite.Operation` and of the numbers of the calls that
            it computes, in order.
        floats: the paths of the calls that it computes in floats.
    """

    def __init__(self, interpreter, inputs, outputs, traced):
        self.interpreter, self.inputs, self.outputs = interpreter, inputs, outputs
        self.paths = {number: call.path for number, call in traced.calls.items()}
        self._shown = set(traced.values)
        self._weighted = {
            number
            for number, call in traced.calls.items()
            if isinstance(call.operation, FakeQuantizedLinear)
            or is_linear(call.operation)
        }
        self.floats: list[str] = []
        operations, tensors = interpreter.operations(), interpreter.outputs()
        ends = {tensors[n]: i for n, i in zip(outputs, traced.last, strict=True)}
        numbers = self._computed(operations, ends)
        self.operations = list(zip(operations, numbers, strict=True))

    def run(self, batch):
        """Run a batch, a list of arrays; an operation that fails is one of a layer."""
        try:
            self.interpreter.run(dict(zip(self.inputs, batch, strict=True)))
        except tflite.RunError as error:
            path = self.paths[self.operations[error.operation][1][-1]]
            raise ValueError(
                f"TFLite cannot run '{path}' in int8 on these samples: {error}"
            ) from error

    def __call__(self, batch):
        """The outputs for a batch, both lists of arrays."""
        self.run(batch)
        tensors = self.interpreter.outputs()
        return [self.interpreter.value(tensors[name]) for name in self.outputs]

    def places(self):
        """The `Place` of each call that has a tensor of its own, by its number."""
        places: dict[int, Place] = {}
        inside: set[int] = set()
        for operation, numbers in self.operations:
            *before, number = numbers
            if operation.name in _MOVES and number in places:
                continue
            first = next((i for i in numbers if i in self._weighted), number)
            inside.update(before)
            # Of the operations of one call, the last gives its output.
            places[number] = Place(operation.tensors[-1], operation.name, first, set())
        # What was merged into an operation of a later call has no tensor of its own.
        shown = self._shown - inside
        places = {i: place for i, place in places.items() if i in shown}
        made = {place.tensor: number for number, place in places.items()}
        comes_from: dict[int, set[int]] = {}
        for operation, _ in self.operations:
            sources = set().union(*(comes_from.get(i, set()) for i in operation.inputs))
            for tensor in operation.tensors:
                comes_from[tensor] = {made[tensor]} if tensor in made else sources
                if tensor in made:
                    places[made[tensor]].before.update(sources)
        return places

    def _computed(self, operations, ends):
        """The numbers of the calls that each operation computes, in order.

        `ends` has the number of the call that gives an output, or None, by its index.
        """
        every: list[list[int]] = []
        following = [max(self.paths)]
        for operation in reversed(operations):
            named = {i for n in operation.outputs for i in _tagged(n, self.paths)}
            named |= {ends[i] for i in operation.tensors if ends.get(i) in self.paths}
            # What has no name of its own belongs to what comes after it.
            following = sorted(named) or following
            every.insert(0, list(following))
        seen: set[int] = set()
        for operation, numbers in zip(operations, every, strict=True):
            if operation.name in _WEIGHTED and self._weighted.isdisjoint(numbers):
                # The tensor of an output is named after the output alone.
                before = [i for i in sorted(self._weighted) if i < numbers[-1]]
                numbers[:0] = [i for i in before if i not in seen][-1:]
            seen.update(numbers)
        return every


def _tagged(text, known):
    """The numbers of the known calls that the name of a tensor, or a message, names."""
    numbers = [int(number) for number in re.findall(r"\bcall(\d+)/", text)]
    return [number for number in numbers if number in known]


def convert(
    model, example, options, samples=None, keep_float=frozenset(), quoted="'{}'".format
):
    """A model as a `File`, with no operation of floats in it but those named.

    Args:
        example: a batch as the file takes it, a list of arrays.
        options: the `Options`.
        samples: batches to measure ranges with; None for a model that has them.
        keep_float: paths of the calls that stay in floats; at 16 bits, of those that
            may, where they have no integers.
        quoted: gives what an error says for the path of a layer.
    """
    given = _once(tensor.name for tensor in graph_of(model).inputs)
    made = _once(graph_of(model).output_names)
    inputs = dict(zip(given, example, strict=True))
    values = [(v, keras.ops.convert_to_numpy(v)) for v in model.variables]
    traced: Any = None

    def function(*tensors):
        nonlocal traced
        constants = [(v, keras.ops.convert_to_tensor(a, v.dtype)) for v, a in values]
        with keras.StatelessScope(state_mapping=constants):
            traced = through(model, list(tensors))
        return dict(zip(made, traced.outputs, strict=True))

    def measured():
        for batch in samples:
            yield dict(zip(given, batch, strict=True))
            if options.activations == 16:
                more = ((x * (_ROOM if x.dtype.kind == "f" else 1)) for x in batch)
                yield dict(zip(given, more, strict=True))

    def in_floats(interpreter):
        file = File(interpreter, given, made, traced)
        return [
            name
            for operation, numbers in file.operations
            if not keep_float.isdisjoint(file.paths[i] for i in numbers)
            for name in operation.outputs
        ]

    def said(error):
        """What an error says for the paths of the calls that it names."""
        numbers = _tagged(str(error), traced.calls)
        return [quoted(traced.calls[number].path) for number in sorted(set(numbers))]

    advice = _MEASURES if samples is None else " Or name it in `keep_float`."
    try:
        ranges, floats_of = samples and measured, in_floats if keep_float else None
        bits = options.activations
        content = tflite.convert(function, inputs, ranges, bits, floats_of)
    except tflite.ConversionError as error:
        paths = said(error)
        kept = bool(paths) and {quoted(path) for path in keep_float}.issuperset(paths)
        raise refusal(model, paths, error, "" if kept else advice) from error
    try:
        tflite.check_runs(content, inputs)
        interpreter = tflite.Interpreter(content)
    except (tflite.RunError, RuntimeError) as error:
        does = "run" if isinstance(error, tflite.RunError) else "load"
        raise ValueError(
            f"TFLite cannot {does} the file of '{model.name}': {error}."
        ) from error
    file = File(interpreter, given, made, traced)
    left: dict[str, list[str]] = {}
    floats: dict[str, None] = {}
    for operation, numbers in file.operations:
        real = any(dtype.startswith(("float", "complex")) for dtype in operation.dtypes)
        if operation.name in _MOVES or not real:
            continue
        paths = [file.paths[number] for number in numbers]
        if keep_float.isdisjoint(paths):
            left.setdefault(quoted(paths[-1]), []).append(operation.name)
        else:
            floats.update(dict.fromkeys(paths))
    if left:
        parts = [f"{', '.join(names)} of {path}" for path, names in left.items()]
        why = f"it leaves {'; '.join(parts)} in floats"
        raise refusal(model, left, why, advice)
    file.floats = list(floats)
    if options.to_onnx:
        try:
            file.interpreter = onnx.Interpreter(interpreter, options.symmetric)
        except tflite.ConversionError as error:
            # The tensor of an output is named after the output alone.
            paths = said(error) or [quoted(file.paths[max(file.paths)])]
            raise ValueError(
                f"tf2onnx cannot translate {', '.join(paths)} of '{model.name}': "
                f"{error}. Replace it by other layers, or write a `.tflite` file."
            ) from error
    return file


def _once(names):
    """Names, with a number where one comes again."""
    unique: list[str] = []
    for name in names:
        new, number = name, 1
        while new in unique:
            new, number = f"{name}_{number}", number + 1
        unique.append(new)
    return unique


def refusal(model, paths, why, advice=_MEASURES):
    """The error that names layers, and the first line of `why` that tells of one."""
    names = ", ".join(paths) or "a layer"
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line] or lines
    return ValueError(
        f"TensorFlow's converter cannot make {names} of '{model.name}' integer: "
        f"{errors[0].rpartition('error: ')[2]}. Replace what it names by other layers, "
        f"or take it out of the model that is exported.{advice}"
    )
