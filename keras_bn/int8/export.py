"""Writing a model as a `.tflite` or `.onnx` file of integers."""

import fnmatch
import functools
import math
import numbers
import os
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import keras

from keras_bn.int8 import onnx, tflite
from keras_bn.int8.convert import check_layers, constant, convert, names_of
from keras_bn.int8.correct import correct, shifts_of
from keras_bn.int8.equalize import equalize as equalize_channels
from keras_bn.int8.layers import FakeQuantizer
from keras_bn.int8.lose import Scored, accuracy, raised
from keras_bn.int8.measure import check_finite, compare
from keras_bn.int8.report import Int8Report
from keras_bn.int8.samples import example_of, random_samples, samples_of
from keras_bn.pages import files
from keras_bn.pages.origin import origin_of
from keras_bn.surgery.calls import check_graph
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.functional import opened
from keras_bn.surgery.graph import graph_of, nodes
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
    model, with ranges that it measures on `data`. The file is checked before it is
    written: no operation in it computes in floats but those that `keep_float` and
    `lose` leave.

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
        correct_bias: whether to correct biases for the mean error that rounding the
            weights causes on the samples.
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
        lose=lose,
        metric=metric,
        suffix=pathlib.Path(path).suffix,
        symmetric=symmetric,
    )
    files.write_whole(path, lambda part: part.write_bytes(content), force=True)
    report.origin = origin_of(data)
    return report


class Options(NamedTuple):
    """How a file is made: as in `export_int8`, but for the last two.

    Args:
        per_channel: whether each output channel of a kernel has a scale of its own.
        suffix: of the path of the file.
    """

    equalize: bool = False
    correct_bias: bool = True
    activations: int = 8
    keep_float: Sequence[str] = ()
    lose: float | None = None
    metric: Callable[..., float] = accuracy
    symmetric: bool = False
    per_channel: bool = True
    suffix: str = ".tflite"

    @property
    def to_onnx(self) -> bool:
        """Whether the file is one of ONNX."""
        return self.suffix.lower() == ".onnx"


def integer_file(model, data=None, *, steps=None, batch_size=None, **options):
    """The content of the file that `export_int8` writes, and its report.

    Args:
        **options: those of `Options`.

    Returns:
        `(bytes, Int8Report)`.
    """
    tflite.check_backend("export_int8")
    chosen = Options(**options)
    _check(chosen)
    to_onnx = None
    if chosen.to_onnx:
        onnx.check_installed()
        to_onnx = functools.partial(onnx.Interpreter, symmetric=chosen.symmetric)
    with opened(ModelView(model), strict=True) as (view, _):
        check_graph(view)
        check_layers(view)
        model, samples, labels = view.model, None, None
        if data is not None:
            samples, labels = samples_of(
                model, data, steps, batch_size, chosen.lose is not None
            )
        if view.of_type(FakeQuantizer):
            others = {
                "equalize": chosen.equalize,
                "activations": chosen.activations != 8,
                "keep_float": chosen.keep_float,
                "lose": chosen.lose is not None,
            }
            if refused := [f"`{name}`" for name, used in others.items() if used]:
                raise ValueError(
                    f"{', '.join(refused)}: for models that are not from "
                    "`keras_bn.quantize_aware`, whose weights and activations are "
                    "trained for 8 bits."
                )
            return _from_aware(view, samples, to_onnx)
        if samples is None:
            raise ValueError(
                f"'{model.name}' is not from `keras_bn.quantize_aware`, so it has no "
                "ranges of activations. Give `data`: a few hundred samples as in "
                "training."
            )
        if chosen.lose is not None and labels is None:
            raise ValueError("`lose` needs labels: give `data` with them, as `(x, y)`.")
        check_finite(model, samples)
        return _from_floats(view, samples, labels, chosen, to_onnx)


def _check(options: Options) -> None:
    """Refuse options that are invalid, or that do not go together."""
    bits, lose, metric = options.activations, options.lose, options.metric
    received = f"activations={bits!r}"
    number = isinstance(lose, numbers.Real) and 0 <= float(lose) < math.inf
    if bits not in (8, 16):
        raise ValueError(f"`activations` must be 8 or 16. Received: {received}")
    if not (lose is None or number):
        raise ValueError(
            f"`lose` must be a number, 0 or greater. Received: lose={lose!r}"
        )
    if lose is not None and bits != 8:
        raise ValueError(
            "`lose` keeps layers in floats, which TensorFlow's converter does only "
            f"beside 8 bits. Received: {received}"
        )
    if not callable(metric):
        raise ValueError(
            "`metric` must be a function of labels and outputs. Received: "
            f"metric={metric!r}"
        )
    if lose is None and metric is not accuracy:
        raise ValueError("`metric` is for `lose`. Received: lose=None")
    if options.to_onnx and bits != 8:
        raise ValueError(
            "`activations` must be 8 for an `.onnx` file: onnxruntime has no "
            f"convolution with others. Received: {received}"
        )
    if options.symmetric and not options.to_onnx:
        raise ValueError(
            "`symmetric` is for an `.onnx` file. Received: symmetric=True and a path "
            f"that ends in {options.suffix!r}"
        )


def _from_floats(view, samples, labels, options, to_onnx):
    """The content of the file of a model of floats, and its report."""
    model, plan = view.model, FoldPlan(view)
    reference = plan.folded_model()
    folded = ModelView(reference)
    keep_float = _matching(folded, options.keep_float)
    score = None
    if options.lose is not None:
        names = names_of(reference)
        score = Scored(model, samples, labels, names, options.metric)
    equalized = equalize_channels(folded) if options.equalize else []
    shifts = shifts_of(folded, samples) if options.correct_bias else {}
    compared = samples[:_COMPARED]

    def written(keep_float, exact=frozenset()):
        """`(report, content, interpreter)` with layers in floats.

        Args:
            keep_float: their paths.
            exact: the paths of further layers whose weights are not rounded.
        """
        exact |= keep_float if options.activations == 8 else set()
        rounded = {path: s for path, s in shifts.items() if path not in exact}
        converted, of = copy_model(reference, compiled=False, view=folded)
        correct(folded, rounded, of)
        content, interpreter, floats = convert(
            converted,
            samples[0],
            samples,
            options.per_channel,
            bits=options.activations,
            keep_float=keep_float,
            onnx=to_onnx,
        )
        if not rounded.keys().isdisjoint(floats):  # of an operation with another layer
            return written(keep_float, exact.union(floats))
        outputs, layers = compare(
            interpreter, model, reference, compared, names_of(converted)
        )
        report = Int8Report(
            model.name,
            len(content),
            sum(len(batch[0]) for batch in compared),
            False,
            outputs,
            layers,
            equalized,
            list(rounded),
            {fold.layer: fold.reason for fold in plan.folds if fold.into is None},
            floats,
        )
        return report, content, interpreter

    first = written(keep_float)
    if score is None:
        return first[1], first[0]
    report, content = raised(
        first, lambda paths: written(keep_float | paths), score, options.lose
    )
    return content, report


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
    layers, matching = view.layers[1:], set()
    graphs = [("", view.graph), *((f"{p}/", graph_of(layer)) for p, layer in layers)]
    calls = {
        f"{within}{node.operation.name}"
        for within, graph in graphs
        if graph is not None
        for node in nodes(graph)
        if graph_of(node.operation) is None
    }
    every = calls.union(path for path, _ in layers)
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


def _from_aware(view, samples, to_onnx):
    """The content of the file of a model from `quantize_aware`, and its report."""
    model, random = view.model, samples is None
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
