"""Writing a model as a fully integer `.tflite` or `.onnx` file."""

import fnmatch
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import keras

from keras_bn.int8 import onnx, tflite
from keras_bn.int8.convert import check_layers, constant, convert, names_of
from keras_bn.int8.correct import correct
from keras_bn.int8.equalize import equalize as equalize_channels
from keras_bn.int8.layers import FakeQuantizer
from keras_bn.int8.measure import check_finite, compare
from keras_bn.int8.report import Int8Report
from keras_bn.int8.samples import example_of, random_samples, samples_of
from keras_bn.pages import files
from keras_bn.surgery.calls import check_graph
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.functional import opened
from keras_bn.surgery.private import require
from keras_bn.surgery.view import ModelView
from keras_bn.tools.fold import FoldPlan

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
    activations: int = 8,
    keep_float: Sequence[str] = (),
    symmetric: bool = False,
) -> Int8Report:
    """Write a model as a `.tflite` or `.onnx` file that computes with integers alone.

    Inputs and outputs are int8, kernels int8 with a scale for each output channel,
    activations int8 with a scale for each tensor. The file takes one sample at a time,
    unless the model fixes another batch size.

    An `.onnx` file has the same integers in the QDQ form, of which onnxruntime makes
    integer operations. Its activations are uint8, and its inputs and outputs floats.

    This folds the batch normalizations first. Then TensorFlow's converter quantizes the
    model, with ranges that it measures on `data`. The file is checked before it is
    written: no operation in it computes in floats.

    Args:
        model: a built model, which does not change: Functional, Sequential, or one that
            `keras_bn.functional` can open. Either any such model, with `data`; or one
            from `keras_bn.quantize_aware`.
        path: where to write the file; one that exists is replaced. An `.onnx` file if
            it ends so, for which `pip install keras_bn[onnx]` brings what is needed.
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
        activations: bits of the activations, of inputs and outputs too: 8, or 16, which
            lose less and take more time. Kernels have 8.
        keep_float: paths of layers, or patterns as `"block*"`, that may stay in floats
            where TFLite has no integers for them, as `ELU` or `LayerNormalization`. The
            report says which did. None by default.
        symmetric: of an `.onnx` file, whether activations are int8 with a zero point of
            0, as some runtimes want it.

    Returns:
        An `Int8Report`: the error of each layer against float, the worst first.
        `print(report)` shows it.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: for models that `keras_bn.functional` refuses, layers that the
            converter cannot make integer, by name, and models that do not compute in
            float32; if there is no data, or none is given and the model is not from
            `quantize_aware`. Nothing is written then.
        OSError: if the file cannot be written.
        RuntimeError: on another backend than TensorFlow.
        ImportError: if what an `.onnx` file needs is not installed.

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
        activations=activations,
        keep_float=keep_float,
        suffix=pathlib.Path(path).suffix,
        symmetric=symmetric,
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
    activations=8,
    keep_float=(),
    suffix=".tflite",
    symmetric=False,
):
    """The content of the file that `export_int8` writes, and its report.

    Args:
        per_channel: whether each output channel of a kernel has a scale of its own.
        suffix: of the path of the file.
        **others: as in `export_int8`.

    Returns:
        `(bytes, Int8Report)`.
    """
    tflite.check_backend("export_int8")
    if activations not in (8, 16):
        raise ValueError(
            f"`activations` must be 8 or 16. Received: activations={activations!r}"
        )
    to_onnx = None
    if suffix == ".onnx":
        if activations != 8:
            raise ValueError(
                "`activations` must be 8 for an `.onnx` file: onnxruntime has no "
                f"convolution with others. Received: activations={activations!r}"
            )
        onnx.check_installed()
        to_onnx = functools.partial(onnx.Interpreter, symmetric=symmetric)
    elif symmetric:
        raise ValueError(
            "`symmetric` is for an `.onnx` file. Received: symmetric=True and a path "
            f"that ends in {suffix!r}"
        )
    with opened(ModelView(model), strict=True) as (view, _):
        check_graph(view)
        check_layers(view)
        model = view.model
        if view.of_type(FakeQuantizer):
            if equalize or correct_bias:
                raise ValueError(
                    "`equalize` and `correct_bias` are for models that are not from "
                    "`keras_bn.quantize_aware`, whose weights are trained for int8."
                )
            if activations != 8 or keep_float:
                raise ValueError(
                    "`activations` and `keep_float` are for models that are not from "
                    "`keras_bn.quantize_aware`, which rounds all activations to 8 bits."
                )
            return _from_aware(view, data, steps, batch_size, to_onnx)
        if data is None:
            raise ValueError(
                f"'{model.name}' is not from `keras_bn.quantize_aware`, so it has no "
                "ranges of activations. Give `data`: a few hundred samples as in "
                "training."
            )
        samples = samples_of(model, data, steps, batch_size)
        check_finite(model, samples)
        plan = FoldPlan(view)
        reference = converted = plan.folded_model()
        equalized, scales, corrected = [], {}, []
        if equalize or correct_bias:
            folded = ModelView(reference)
            if equalize:
                equalized, scales = equalize_channels(folded)
            if correct_bias:
                converted, of = copy_model(reference, compiled=False, view=folded)
                corrected = correct(folded, of, view, plan, scales)
        content, interpreter, floats = convert(
            converted,
            samples[0],
            samples,
            per_channel,
            bits=activations,
            keep_float=_matching(converted, keep_float),
            onnx=to_onnx,
        )
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
            {fold.layer: fold.reason for fold in plan.folds if fold.into is None},
            floats,
        )


def _matching(model, patterns):
    """The paths of a model that `keep_float` names."""
    if isinstance(patterns, str):
        raise ValueError(
            "`keep_float` must be a list of paths or patterns. Received: "
            f"keep_float={patterns!r}"
        )
    paths = [path for path, _ in ModelView(model).layers] if patterns else []
    matching = set()
    for pattern in patterns:
        matches = fnmatch.filter(paths, pattern)
        if not matches:
            raise ValueError(
                f"`keep_float` names {pattern!r}, and '{model.name}' has no such layer "
                "after its normalizations are folded."
            )
        matching.update(matches)
    return matching


def _from_aware(view, data, steps, batch_size, to_onnx):
    """The content of the file of a model from `quantize_aware`, and its report."""
    for path, quantizer in view.of_type(FakeQuantizer).items():
        if quantizer.bits != 8:
            raise ValueError(
                f"'{path}' rounds to {quantizer.bits} bits, and a file has 8. Train "
                "with `activation_bits=8`."
            )
    model, random = view.model, data is None
    samples = [] if random else samples_of(model, data, steps, batch_size)
    example = example_of(model) if random else samples[0]
    with constant(view):
        content, interpreter, _ = convert(model, example, onnx=to_onnx)
    names = names_of(model)
    if random:
        samples = random_samples(interpreter, example, names.inputs, _COMPARED)
    samples = samples[:_COMPARED]
    outputs, layers = compare(interpreter, model, model, samples, names)
    count = sum(len(batch[0]) for batch in samples)
    return content, Int8Report(
        model.name, len(content), count, random, outputs, layers, [], [], {}
    )
