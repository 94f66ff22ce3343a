"""Writing a model as a `.tflite` or `.onnx` file of integers."""

import fnmatch
import os
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras

from keras_bn.int8 import onnx, tflite
from keras_bn.int8.convert import check_layers, constant, convert
from keras_bn.int8.correct import correct
from keras_bn.int8.equalize import equalize as equalize_channels
from keras_bn.int8.layers import FakeQuantizer
from keras_bn.int8.lose import CONVERSIONS, Scored, raised
from keras_bn.int8.measure import check_finite, compare
from keras_bn.int8.options import Options, accuracy
from keras_bn.int8.report import Int8Report
from keras_bn.int8.samples import example_of, random_samples, samples_of
from keras_bn.pages import files
from keras_bn.pages.origin import origin_of
from keras_bn.surgery.calls import paths
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
    correct_bias: bool = True,
    activations: int = 8,
    keep_float: Sequence[str] = (),
    lose: float | None = None,
    metric: Callable[..., float] = accuracy,
    symmetric: bool = False,
) -> Int8Report:
    """Write a model as a `.tflite` or `.onnx` file that computes with integers.

    Inputs and outputs are int8, kernels int8 with a scale for each output channel,
    activations int8 with a scale for each tensor. The file takes one sample at a time,
    unless the model fixes another batch size.

    An `.onnx` file has the same integers in the QDQ form, of which onnxruntime makes
    integer operations. Its activations are uint8, and its inputs and outputs floats.

    This folds the batch normalizations first. Then TensorFlow's converter quantizes the
    model, with ranges measured on `data`. The file is checked before it is written: no
    operation in it computes in floats but those that `keep_float` and `lose` leave.

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
            their weights have equal ranges. It helps where the channels of a tensor
            have very different ranges, and may harm a little elsewhere.
        correct_bias: whether to round the weights so that on the samples their errors
            make up for each other, and to correct biases for the mean error. Those of a
            model from `quantize_aware` stay as they were trained.
        activations: bits of the activations, of inputs and outputs too: 8, or 16, which
            lose less and take more time. Kernels have 8.
        keep_float: paths of layers, operations and models in the model, or patterns as
            `"block*"`, that stay in floats, also where TFLite has no integers for them,
            as for `ELU`; with `activations=16`, only there. None by default.
        lose: how much lower than that of the model the `metric` of the file may be, as
            0.01. The layers that add most error stay in floats until it is not lower,
            the fewest that bisection finds in at most eight conversions. `data` needs
            labels then, as `(x, y)`. The report says which layers and why, and how much
            larger and slower the file became. None asks for integers alone.
        metric: for `lose`, a function of labels and outputs (an array, or a list of
            arrays where the model has several), greater where better. Weights of
            samples are not used. The accuracy by default.
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
            `quantize_aware`; if no file is found that loses as little as `lose`.
            Nothing is written then.
        OSError: if the file cannot be written.
        RuntimeError: on another backend than TensorFlow, or one that lacks what
            `keep_float` and `lose` need.
        ImportError: if what an `.onnx` file needs is not installed.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018. Rounding: Frantar et al., "GPTQ", 2023.
    Equalization and bias correction: Nagel et al., "Data-Free Quantization Through
    Weight Equalization and Bias Correction", 2019.

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
    chosen = equalize, correct_bias, activations, keep_float, lose, metric, symmetric
    options = Options(*chosen, suffix=pathlib.Path(path).suffix)._asdict()
    content, report = integer_file(
        model, data, steps=steps, batch_size=batch_size, **options
    )
    files.write_whole(path, lambda part: part.write_bytes(content), force=True)
    report.origin = origin_of(data)
    return report


def integer_file(model, data=None, *, steps=None, batch_size=None, **options):
    """The bytes of the file that `export_int8` writes, and its report.

    The options are those of `Options`.
    """
    tflite.check_backend("export_int8")
    chosen = Options(**options)
    chosen.check()
    if chosen.to_onnx:
        onnx.check_installed()
    with opened(ModelView(model), strict=True) as (view, _):
        check_layers(view)
        samples, labels = None, None
        if data is not None:
            samples, labels = samples_of(
                view.model, data, steps, batch_size, chosen.lose is not None
            )
        if view.of_type(FakeQuantizer):
            report, file = _from_aware(view, samples, chosen)
        else:
            report, file = _from_floats(view, samples, labels, chosen)
    return file.interpreter.content, report


def _report(file, model, reference, samples, drawn=False):
    """The report on a file, by the first of the samples: `compare` says of what."""
    samples = samples[:_COMPARED]
    outputs, layers = compare(file, model, reference, samples)
    size, count = len(file.interpreter.content), sum(len(x) for x, *_ in samples)
    return Int8Report(
        model.name, size, count, drawn, outputs, layers, floats=file.floats
    )


def _from_aware(view, samples, options):
    """The report on the file of a model from `quantize_aware`, and the file."""
    refused = {
        "equalize": options.equalize,
        "activations": options.activations != 8,
        "keep_float": options.keep_float,
        "lose": options.lose is not None,
    }
    if names := [f"`{name}`" for name, used in refused.items() if used]:
        raise ValueError(
            f"{', '.join(names)}: for models that are not from "
            "`keras_bn.quantize_aware`, whose weights and activations are trained for "
            "8 bits."
        )
    model, random = view.model, samples is None
    example = example_of(model) if random else samples[0]
    with constant(view):
        file = convert(model, example, options)
    if random:
        interpreter, indices = file.interpreter, file.interpreter.inputs()
        tensors = [interpreter.tensors[indices[name]] for name in file.inputs]
        samples = random_samples(tensors, example, _COMPARED)
    return _report(file, model, model, samples, random), file


def _from_floats(view, samples, labels, options):
    """The report on the file of a model of floats, and the file."""
    model, lose = view.model, options.lose
    if samples is None:
        raise ValueError(
            f"'{model.name}' is not from `keras_bn.quantize_aware`, so it has no "
            "ranges of activations. Give `data`: a few hundred samples as in training."
        )
    if lose is not None and labels is None:
        raise ValueError("`lose` needs labels: give `data` with them, as `(x, y)`.")
    check_finite(model, samples)
    plan = FoldPlan(view)
    reference = plan.folded_model()
    folded = ModelView(reference)
    named = _matching(folded, options.keep_float)
    score = None if lose is None else Scored(model, samples, labels, options.metric)
    equalized = equalize_channels(folded) if options.equalize else []
    kept = {fold.layer: fold.reason for fold in plan.folds if fold.into is None}
    conversions = 0

    def written(keep_float, exact=frozenset()):
        """`(report, file)` with layers in floats, by path, and `exact` not rounded."""
        nonlocal conversions
        conversions += 1
        exact = exact | keep_float if options.activations == 8 else exact
        converted, of = copy_model(reference, compiled=False, view=folded)
        rounded = correct(folded, of, samples, exact) if options.correct_bias else []
        file = convert(converted, samples[0], options, samples, keep_float)
        together = not set(rounded).isdisjoint(file.floats)  # in one operation
        if together and conversions < CONVERSIONS:
            return written(keep_float, exact.union(file.floats))
        report = _report(file, model, reference, samples)
        report.equalized, report.corrected = equalized, rounded
        report.kept, report.conversions = kept, conversions
        return report, file

    first = written(named)
    if score is None:
        return first
    exact = frozenset(first[0].floats)
    return raised(first, lambda more: written(named | more, exact), score, lose)


def _matching(view, patterns):
    """The paths of the calls in a model that `keep_float` names.

    A model names all calls in it, and a layer within another the whole of that.
    """
    listed = isinstance(patterns, Collection) and not isinstance(patterns, str)
    if not (listed and all(isinstance(pattern, str) for pattern in patterns)):
        raise ValueError(
            "`keep_float` must be a list of paths or patterns. Received: "
            f"keep_float={patterns!r}"
        )
    calls, matching = set(paths(view.graph)), set()
    every = calls.union(path for path, _ in view.layers[1:])
    for pattern in patterns:
        named = [f"{path}/" for path in fnmatch.filter(every, pattern)]
        matches = {
            call
            for call in calls
            if any(f"{call}/".startswith(n) or n.startswith(f"{call}/") for n in named)
        }
        if not matches:
            raise ValueError(
                f"`keep_float` names {pattern!r}, and '{view.model.name}' computes no "
                "such layer after its normalizations are folded."
            )
        matching.update(matches)
    return matching
