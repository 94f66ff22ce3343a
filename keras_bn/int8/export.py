"""Writing a model as a fully integer `.tflite` file."""

import contextlib
import os
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_bn.int8 import tflite
from keras_bn.int8.correct import correct
from keras_bn.int8.equalize import equalize as equalize_channels
from keras_bn.int8.layers import Constants, FakeQuantizedLinear, quantizers
from keras_bn.int8.measure import compare, tag, tagged
from keras_bn.int8.report import Int8Report
from keras_bn.pages import files
from keras_bn.passes.observe import batches
from keras_bn.surgery.calls import as_list, check_graph, run
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.graph import graph_of, walk
from keras_bn.surgery.private import require
from keras_bn.tools.fold import Plan

# Samples that the report compares.
_COMPARED = 64


def export_int8(
    model: keras.Model,
    path: str | os.PathLike[str],
    data: Any = None,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    equalize: bool = False,
    correct_bias: bool = False,
) -> Int8Report:
    """Write a model as a `.tflite` file that computes with integers alone.

    Inputs and outputs are int8, kernels int8 with a scale for each output channel,
    activations int8 with a scale for each tensor. The file takes one sample at a time,
    unless the model fixes another batch size.

    This folds the batch normalizations first. Then TensorFlow's converter quantizes the
    model, with ranges that it measures on `data`. The file is checked before it is
    written: no operation in it computes in floats.

    Args:
        model: a built Functional or Sequential model, which does not change. Either any
            such model, with `data`; or one from `keras_bn.quantize_aware`.
        path: where to write the file; one that exists is replaced.
        data: samples as in training, as `fit` takes them: arrays, a `tf.data.Dataset`,
            a `keras.utils.PyDataset`, or a generator with `steps`. A few hundred are
            enough. All are kept in memory. A model from `quantize_aware` has its
            ranges, and needs data only for the report.
        steps: how many batches to take; all of them by default.
        batch_size: for arrays; 32 by default.
        equalize: whether to scale the channels between neighbouring layers so that
            their weights have equal ranges.
        correct_bias: whether to correct biases for the mean error that rounding the
            weights causes. The mean inputs follow from the gamma and beta of the batch
            normalization before the layer.

    Returns:
        An `Int8Report`: the error of each layer against float, the worst first.
        `print(report)` shows it.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: for models that are not Functional or Sequential, layers that the
            converter cannot make integer, by name, and models that do not compute in
            float32; if there is no data, or none is given and the model is not from
            `quantize_aware`. Nothing is written then.
        OSError: if the file cannot be written.
        RuntimeError: on another backend than TensorFlow.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018. Equalization and bias correction: Nagel et
    al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019.

    Example:

    >>> import keras, keras_bn, numpy as np, tempfile
    >>> path = tempfile.mkdtemp() + "/model.tflite"
    >>> model = keras.Sequential([
    ...     keras.Input((8, 8, 1)),
    ...     keras.layers.Conv2D(4, 3, name="conv"),
    ...     keras_bn.BatchNormalization(),
    ...     keras.layers.ReLU(name="relu"),
    ... ])
    >>> x = np.random.default_rng(0).normal(size=(100, 8, 8, 1)).astype("float32")
    >>> report = keras_bn.export_int8(model, path, x)
    >>> report.layers[0].layer, report.layers[0].operation, report.error < 0.05
    ('conv', 'CONV_2D', True)
    """
    require("keras_bn.export_int8", "layers", "graph", "copy", "data")
    files.check_writable(path, force=True)
    content, report = integer_file(
        model,
        data,
        steps=steps,
        batch_size=batch_size,
        equalize=equalize,
        correct_bias=correct_bias,
    )
    files.write_whole(path, lambda part: part.write_bytes(content), force=True)
    return report


def integer_file(
    model,
    data=None,
    *,
    steps=None,
    batch_size=None,
    equalize=False,
    correct_bias=False,
    per_channel=True,
):
    """The content of the file that `export_int8` writes, and its report.

    Args:
        per_channel: whether each output channel of a kernel has a scale of its own.
        **others: as in `export_int8`.

    Returns:
        `(bytes, Int8Report)`.
    """
    tflite.check_backend("export_int8")
    check_graph(model)
    check_layers(model)
    if quantizers(model):
        if equalize or correct_bias:
            raise ValueError(
                "`equalize` and `correct_bias` are for models that are not from "
                "`keras_bn.quantize_aware`, whose weights are trained for int8."
            )
        return _from_aware(model, data, steps, batch_size)
    if data is None:
        raise ValueError(
            f"'{model.name}' is not from `keras_bn.quantize_aware`, so it has no "
            "ranges of activations. Give `data`: a few hundred samples as in training."
        )
    samples = samples_of(model, data, steps, batch_size)
    plan = Plan(model)
    reference = plan.folded_model()
    equalized, scales, corrected = [], {}, []
    if equalize:
        equalized, scales = equalize_channels(reference)
    converted = reference
    if correct_bias:
        converted, _ = copy_model(reference, compiled=False)
        corrected = correct(converted, model, plan.folds, scales)
    content, interpreter = convert(converted, samples[0], samples, per_channel)
    outputs, layers = compare(
        interpreter, model, reference, samples[:_COMPARED], names_of(converted)
    )
    return content, Int8Report(
        model.name,
        len(content),
        sum(len(batch[0]) for batch in samples[:_COMPARED]),
        False,
        outputs,
        layers,
        equalized,
        corrected,
        {each.layer: each.reason for each in plan.folds if each.into is None},
    )


def _from_aware(model, data, steps, batch_size):
    """The content of the file of a model from `quantize_aware`, and its report."""
    for path, quantizer in quantizers(model).items():
        if quantizer.bits != 8:
            raise ValueError(
                f"'{path}' rounds to {quantizer.bits} bits, and a file has 8. Train "
                "with `activation_bits=8`."
            )
    drawn = data is None
    samples = [] if drawn else samples_of(model, data, steps, batch_size)
    example = _example(model) if drawn else samples[0]
    with constant(model):
        content, interpreter = convert(model, example)
    if drawn:
        samples = _drawn(interpreter, example, names_of(model).inputs)
    samples = samples[:_COMPARED]
    outputs, layers = compare(interpreter, model, model, samples, names_of(model))
    count = sum(len(batch[0]) for batch in samples)
    return content, Int8Report(
        model.name, len(content), count, drawn, outputs, layers, [], [], {}
    )


def _example(model):
    """Arrays of the shapes that a model takes.

    Raises:
        ValueError: if a size is not known.
    """
    tensors = graph_of(model).inputs
    for tensor in tensors:
        if None in tensor.shape[1:]:
            raise ValueError(
                f"The input '{tensor.name}' has the shape {tuple(tensor.shape)}, and a "
                "file needs every size. Give `data` of the size that it is to take."
            )
    size = batch_of(model)
    return [np.zeros((size, *tensor.shape[1:]), tensor.dtype) for tensor in tensors]


def _drawn(interpreter, example, names, seed=0):
    """Random samples, spread over the ranges of the inputs."""
    rng, kinds = np.random.default_rng(seed), interpreter.inputs()

    def one(array, name):
        scale, zero_point, dtype = kinds[name]
        if not scale:
            return rng.integers(0, 2, array.shape).astype(array.dtype)
        bounds = np.iinfo(dtype)
        drawn = rng.integers(bounds.min, bounds.max + 1, array.shape)
        return ((drawn - zero_point) * scale).astype(array.dtype)

    return [
        [one(array, name) for array, name in zip(example, names, strict=True)]
        for _ in range(_COMPARED)
    ]


@contextlib.contextmanager
def constant(model):
    """Have the linear layers of a model compute with constants, as a file does."""
    found = [
        layer for _, layer in walk(model) if isinstance(layer, FakeQuantizedLinear)
    ]
    try:
        for layer in found:
            layer.baked = Constants(layer)
        yield
    finally:
        for layer in found:
            layer.baked = None


def check_layers(model):
    """Refuse layers that compute in another dtype than float32."""
    for path, layer in walk(model):
        name = path or layer.name
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


def samples_of(model, data, steps=None, batch_size=None):
    """The inputs in the data, as the file takes them.

    Returns:
        A list of batches of the size that the model fixes, or of one sample; each a
        list of arrays in the order of the model's inputs.

    Raises:
        ValueError: if there are none.
    """
    size = batch_of(model)
    parts = []
    for x, _, _ in batches(data, steps=steps, batch_size=batch_size):
        arrays = as_list(model, x)
        parts.append([keras.ops.convert_to_numpy(array) for array in arrays])
    if not parts:
        raise ValueError("There is no data: not one batch came.")
    if size == 1:
        return [
            [array[i : i + 1] for array in arrays]
            for arrays in parts
            for i in range(len(arrays[0]))
        ]
    whole = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    found = [
        [array[i : i + size] for array in whole]
        for i in range(0, len(whole[0]) - size + 1, size)
    ]
    if not found:
        raise ValueError(
            f"'{model.name}' takes {size} samples at once, and the data has "
            f"{len(whole[0])}."
        )
    return found


def batch_of(model):
    """The batch size that a model fixes, or 1."""
    return graph_of(model).inputs[0].shape[0] or 1


class Names(NamedTuple):
    """The names of the inputs and outputs of a file, in the model's order."""

    inputs: list[str]
    outputs: list[str]


def names_of(model):
    """The `Names` of a model's inputs and outputs, each name once."""
    graph = graph_of(model)

    def once(names):
        found = []
        for name in names:
            alone, number = name, 1
            while alone in found:
                alone, number = f"{name}_{number}", number + 1
            found.append(alone)
        return found

    return Names(once(t.name for t in graph.inputs), once(graph.output_names))


def convert(model, example, samples=None, per_channel=True):
    """The content of a file, with no operation of floats in it.

    Args:
        model: a Functional or Sequential model.
        example: a batch as the file takes it, a list of arrays.
        samples: a list of batches to measure ranges with; None for a model that has
            them.
        per_channel: as in `integer_file`.

    Returns:
        `(bytes, Interpreter)`.

    Raises:
        ValueError: naming the layers that the converter cannot make integer.
    """
    names = names_of(model)
    inputs = [
        (name, array.shape, array.dtype.name)
        for name, array in zip(names.inputs, example, strict=True)
    ]
    values = [(v, keras.ops.convert_to_numpy(v)) for v in model.variables]
    calls = {}

    def around(call, compute):
        calls[call.number] = call
        with tflite.scope(tag(call)):
            return compute()

    def function(*tensors):
        constants = [(v, keras.ops.convert_to_tensor(a, v.dtype)) for v, a in values]
        with keras.StatelessScope(state_mapping=constants):
            outputs = run(model, list(tensors), around)
        return dict(zip(names.outputs, outputs, strict=True))

    def given():
        return (dict(zip(names.inputs, batch, strict=True)) for batch in samples)

    try:
        content = tflite.convert(
            function, inputs, None if samples is None else given, per_channel
        )
    except tflite.ConversionError as error:
        at = sorted({index for index in tagged(str(error)) if index in calls})
        raise _refusal(model, [calls[index].path for index in at], error) from error
    interpreter = tflite.Interpreter(content)
    operations = interpreter.operations()
    left: dict[str, list[str]] = {}
    for i, operation in enumerate(operations):
        if _computes_in_floats(operation):
            path = _path_of(operations[i:], calls)
            left.setdefault(path, []).append(operation.name)
    if left:
        said = [f"{', '.join(names)} of '{path}'" for path, names in left.items()]
        raise _refusal(model, left, f"it leaves {'; '.join(said)} in floats")
    return content, interpreter


def _computes_in_floats(operation):
    floats = any(name.startswith(("float", "complex")) for name in operation.dtypes)
    return floats and operation.name not in ("QUANTIZE", "DEQUANTIZE")


def _path_of(operations, calls):
    """The path of the layer that the first of some operations belongs to."""
    for operation in operations:
        indices = [i for name in operation.outputs for i in tagged(name)]
        if indices:
            return calls[max(indices)].path
    return calls[max(calls)].path


def _refusal(model, paths, why):
    """The error that says which layers cannot be made integer."""
    named = ", ".join(f"'{path}'" for path in paths) or "a layer"
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line] or lines
    return ValueError(
        f"TensorFlow's converter cannot make {named} of '{model.name}' integer: "
        f"{errors[0].rpartition('error: ')[2]}. Replace what it names by other layers, "
        "or take it out of the model that is exported."
    )
