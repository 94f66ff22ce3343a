"""Files of integers: what is in them, how far they are from float, what is refused."""

import functools
import gc
import itertools
import math
import operator
import os
import re
import signal
import sys

import applications
import keras
import numpy as np
import pytest
from keras import layers
from support import backend
from support.marks import slow
from support.rounding import rounded as rounded_kernel
from support.zoo import randomized

import keras_bn
from keras_bn.int8 import tflite
from keras_bn.int8.correct import correct, round_together
from keras_bn.int8.equalize import equalize, input_range, output_range
from keras_bn.int8.export import integer_file
from keras_bn.int8.lose import raised
from keras_bn.int8.report import Int8Layer, Int8Report
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.view import ModelView
from keras_bn.tools.compare import relative_difference
from keras_bn.tools.linear import linear

tf = backend.tensorflow("its converter writes these files")

WEIGHTED = {"Conv2D", "DepthwiseConv2D", "Dense"}
COUNTED = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}


def small(relu=layers.ReLU, bn=keras_bn.BatchNormalization):
    """A convolution, a depthwise block with a skip, a part that is a model, a head."""
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(image)
    x = skip = relu(name="conv_relu")(bn(name="conv_bn")(x))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    x = relu(name="depthwise_relu")(bn(name="depthwise_bn")(x))
    x = layers.Conv2D(8, 1, use_bias=False, name="project")(x)
    x = layers.Add(name="add")([bn(name="project_bn")(x), skip])
    inner = [
        keras.Input((8, 8, 8)),
        layers.Conv2D(12, 3, 2, activation="relu", name="strided"),
    ]
    x = keras.Sequential(inner, name="inner")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return randomized(keras.Model(image, layers.Dense(5, name="head")(x)))


@functools.cache
def images(n=24, shape=(8, 8, 3)):
    return np.random.default_rng(1).normal(size=(n, *shape)).astype("float32")


def run(content, x):
    """The outputs of a file, one sample after the other, by TensorFlow alone."""
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (given,), (made,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    assert given["dtype"] == made["dtype"] == np.int8
    found = []
    for each in x:
        scale, zero = given["quantization"]
        value = np.clip(np.round(each / scale) + zero, -128, 127).astype("int8")
        interpreter.set_tensor(given["index"], value[None])
        interpreter.invoke()
        scale, zero = made["quantization"]
        value = interpreter.get_tensor(made["index"])[0].astype("float32")
        found.append((value - zero) * scale)
    dtypes = {np.dtype(t["dtype"]).name for t in interpreter.get_tensor_details()}
    assert dtypes <= {"int8", "int32", "int64", "bool"} | {"object"}, dtypes
    return np.array(found)


def error(value, expected):
    expected = np.asarray(expected)
    return np.sqrt(np.mean(np.square(value - expected))) / expected.std()


pytestmark = pytest.mark.usefixtures("seeded")
# Of the interpreter that these tests run by themselves.
notice = "ignore:.*tf.lite.Interpreter is deprecated:UserWarning"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, path = small(), tmp_path_factory.mktemp("int8") / "model.tflite"
    before = [v.numpy() for v in model.variables]
    report = keras_bn.export_int8(model, path, images())
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    return model, path, report


@pytest.mark.filterwarnings(notice)
def test_the_file_is_integer_and_near_float(exported):
    model, path, report = exported
    value = run(path.read_bytes(), images())
    found = error(value, model.predict(images(), verbose=0))
    assert 1e-4 < found < 0.05
    # TensorFlow's interpreter with its delegates, which round in a way of their own.
    assert report.error == pytest.approx(found, rel=0.3)
    assert list(report.outputs) == ["head"]
    assert report.size == path.stat().st_size
    assert report.samples == 24


def test_the_report_names_layers_worst_first(exported):
    *_, report = exported
    errors = [each.error for each in report.layers]
    assert errors == sorted(errors, reverse=True)
    assert {each.layer: (each.output, each.operation) for each in report.layers} == {
        "conv": ("conv_relu", "CONV_2D"),
        "depthwise": ("depthwise_relu", "DEPTHWISE_CONV_2D"),
        "project": ("project", "CONV_2D"),
        "add": ("add", "ADD"),
        "inner/strided": ("inner/strided", "CONV_2D"),
        "pool": ("pool", "MEAN"),
        "head": ("head", "FULLY_CONNECTED"),
    }
    assert all(1e-4 < each < 0.05 for each in errors)
    text, record = str(report), report.to_dict()
    assert "all integer" in text
    assert "depthwise_relu" in text
    assert record["layers"][0]["error"] == errors[0]
    assert record["outputs"] == report.outputs


def rows_of(page):
    """What the section of int8 says of each layer: path, with, operation, error."""
    section = page[page.index("Layers in int8") :]
    row = (
        r'<tr class="\w+">\s*<th scope="row">(.*?)<small>(.*?)</small></th>\s*'
        r'<td data-label="Operation">(\w+)</td>.*?width:(\d+)%.*?<small>(.*?)</small>'
    )
    return re.findall(row, section.replace("<wbr>", ""), re.S)


def test_the_report_is_a_page_and_a_part_of_the_diagnosis(exported):
    model, _, report = exported
    diagnosis = keras_bn.diagnose(model, images())
    alone, cell = report.to_html(), report._repr_html_()
    both = diagnosis.to_html(report)
    for page in (alone, cell, both):
        assert rows_of(page) == [
            (
                each.layer,
                "" if each.output == each.layer else f"with {each.output}",
                each.operation,
                f"{each.error / 0.1:.0%}"[:-1],
                f"{each.error:.2%}",
            )
            for each in report.layers
        ]
        assert f"{report.size:,} bytes, all integer" in page
        assert f"output head: error {report.error:.2%}" in page
        assert not re.search("https?:", page)
    assert "default-src 'none'" in alone
    for words in report.origin.time, f"Keras {keras.__version__}", "Data: ndarray (":
        assert words in alone
    assert 'class="keras-bn cell"' in cell
    # The diagnosis is as it is without, and the layers in int8 come last.
    assert both.startswith(diagnosis.to_html().partition("</main>")[0].rstrip())
    for wrong in "report", diagnosis:
        with pytest.raises(TypeError, match=r"`int8` must be .*export_int8 returns"):
            diagnosis.to_html(wrong)


def test_names_are_escaped_and_errors_beyond_the_scale_fill_the_bar():
    layer_of = functools.partial(Int8Layer, "<i>&", "<b>&", "CONV_2D")
    layers_of = [layer_of(math.nan), layer_of(0.7), layer_of(0.025)]
    counts = {"size": 9, "samples": 1, "drawn": False}
    empty = {"equalized": [("a", "b")], "corrected": ["a"], "kept": {"a": "<u>&"}}
    report = Int8Report(
        "<s>&", **counts, outputs={"<q>&": 0.7}, layers=layers_of, **empty
    )
    page = report.to_html()
    for letter in "isbq":
        assert f"&lt;{letter}&gt;&amp;" in page
        assert f"<{letter}>&" not in page
    assert [row[3:] for row in rows_of(page)] == [
        ("100", "nan%"),
        ("100", "70.00%"),
        ("25", "2.50%"),
    ]
    for said in "layers equalized: 1", "corrected: 1", "not folded: 1 (plan_fold":
        assert said in page


def test_the_report_opens_in_the_browser(exported, monkeypatch):
    shown = []
    monkeypatch.setattr("webbrowser.open", lambda uri: shown.append(uri) or True)
    model, _, report = exported
    pages = [report.open(), keras_bn.diagnose(model).open(report)]
    assert [page.as_uri() for page in pages] == shown
    for page in pages:
        assert rows_of(page.read_text())


def test_an_error_of_a_layer_is_that_of_its_tensor(exported):
    model, path, report = exported
    interpreter = tflite.Interpreter(path.read_bytes())
    (at,) = [op.tensors[0] for op in interpreter.operations() if op.name == "ADD"]
    part = keras.Model(model.input, model.get_layer("add").output)
    value = []
    for x in images():
        interpreter.run({"image": x[None]})
        value.append(interpreter.value(at)[0])
    (of_add,) = [each.error for each in report.layers if each.layer == "add"]
    expected = part.predict(images(), verbose=0)
    assert of_add == pytest.approx(error(np.array(value), expected), rel=1e-3)


KINDS = {
    "dense": ((6, 4), lambda: [layers.Dense(5)]),
    "einsum": (
        (6, 4),
        lambda: [layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d")],
    ),
    "conv1d": ((9, 4), lambda: [layers.Conv1D(5, 3)]),
    "transposed": ((4, 4, 3), lambda: [layers.Conv2DTranspose(5, 3, 2)]),
    "separable": ((8, 8, 4), lambda: [layers.SeparableConv2D(6, 3)]),
    "grouped": ((8, 8, 4), lambda: [layers.Conv2D(6, 3, groups=2)]),
    # Of another width than it has filters: else Keras 3.15.1 adds the bias to columns.
    "channels first": (
        (4, 8, 9),
        lambda: [layers.Conv2D(6, 3, data_format="channels_first")],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_of_every_kind(kind):
    shape, make = KINDS[kind]
    bn = keras_bn.BatchNormalization(axis=1 if kind == "channels first" else -1)
    model = randomized(keras.Sequential([keras.Input(shape), *make(), bn]))
    _, report = integer_file(model, images(16, shape))
    assert 1e-4 < report.error < 0.05
    assert not report.kept


def test_several_inputs_and_outputs():
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    both = layers.Concatenate()([layers.Dense(3)(b), a])
    model = keras.Model(
        {"b": b, "a": a}, {"y": layers.Dense(2)(both), "z": layers.Dense(3)(a)}
    )
    data = {"b": images(32, (4,)), "a": images(32, (6,))}
    content, report = integer_file(model, data)
    assert len(report.outputs) == 2
    assert max(report.outputs.values()) < 0.05
    assert set(tflite.Interpreter(content).inputs()) == {"a", "b"}


def test_data_is_what_fit_takes():
    model = small()
    whole = integer_file(model, images())[0]
    stream = (images()[i : i + 8] for i in range(0, 24, 8))
    assert integer_file(model, stream, steps=3)[0] == whole
    with pytest.raises(ValueError, match="not one batch"):
        integer_file(model, iter(()), steps=2)


@pytest.mark.filterwarnings(notice)
@pytest.mark.parametrize(
    ("name", "aware"),
    [
        ("MobileNet", False),
        pytest.param("MobileNet", True, marks=pytest.mark.slow),
        pytest.param("MobileNetV2", False, marks=pytest.mark.slow),
        pytest.param("MobileNetV2", True, marks=pytest.mark.slow),
        pytest.param("ResNet50", False, marks=pytest.mark.slow),
        pytest.param("ResNet50", True, marks=pytest.mark.slow),
    ],
)
def test_applications(name, aware):
    model = applications.build(name)
    weighted = sum(type(each).__name__ in WEIGHTED for each in model.layers)
    x = images(16, (32, 32, 3))
    if aware:
        model = keras_bn.quantize_aware(model, x)
    content, report = integer_file(model, x)
    found = error(run(content, x), model.predict(x, verbose=0))
    assert report.error == pytest.approx(found, rel=0.5)
    assert found < 0.05
    assert not report.kept
    operations = [each.operation for each in report.layers]
    counted = sum(operations.count(each) for each in COUNTED)
    assert counted == weighted
    assert max(each.error for each in report.layers) < 0.05


def stretched(model, seed=0):
    """The model computing the same with channels scaled apart between its layers."""
    generator = np.random.default_rng(seed)
    conv, depthwise = model.get_layer("conv"), model.get_layer("depthwise")
    factor = np.exp(generator.uniform(-4, 4, conv.kernel.shape[-1]))
    conv.kernel.assign(conv.kernel * factor)
    conv.bias.assign(conv.bias * factor)
    depthwise.kernel.assign(depthwise.kernel / factor[:, None])
    return model


def chain():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, name="conv", bias_initializer="normal"),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, name="depthwise", bias_initializer="normal"),
            layers.MaxPooling2D(),
            layers.Conv2D(6, 2, activation="relu", name="last"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, name="head"),
        ]
    )


def test_equalization_changes_ranges_and_not_the_model():
    model = stretched(chain())
    before = model(images())
    pairs = equalize(ModelView(model))
    assert pairs == [("conv", "depthwise"), ("depthwise", "last"), ("last", "head")]
    assert relative_difference(before, model(images())) < 1e-4
    for first, second in pairs:
        left, right = model.get_layer(first), model.get_layer(second)
        out, into = output_range(linear(left)), input_range(linear(right))
        np.testing.assert_allclose(out, into, rtol=0.05)


def test_equalization_mends_channels_scaled_apart():
    model = stretched(chain())
    errors = [
        integer_file(model, images(), equalize=equal)[1].error
        for equal in (False, True)
    ]
    assert errors[0] > 0.1
    assert errors[1] < 0.04


@pytest.mark.parametrize("between", ["relu6", "two consumers", "flatten", "tanh"])
def test_what_cannot_be_equalized_stays(between):
    image = keras.Input((4, 4, 3))
    x = first = layers.Conv2D(8, 3, padding="same", name="conv")(image)
    if between == "relu6":
        x = layers.ReLU(6.0)(x)
    if between == "flatten":
        x = layers.Flatten()(x)
    if between == "tanh":
        x = layers.Activation("tanh")(x)
    x = layers.Dense(3)(x)
    outputs = [x, first] if between == "two consumers" else x
    assert equalize(ModelView(keras.Model(image, outputs))) == []


def off(model, other, name):
    """How far the channel means of a layer's output are off in another model."""
    means = [
        keras.Model(each.input, each.get_layer(name).output)
        .predict(images(), verbose=0)
        .mean((0, 1, 2))
        for each in (model, other)
    ]
    return np.sqrt(np.mean(np.square(means[0] - means[1])))


def rounded(model):
    """The model with each weight rounded by itself, as the converter does."""
    for layer in model._flatten_layers():
        if (edit := linear(layer)) is not None:
            for name in edit.names:
                matrix, back = edit.as_matrix(name, edit.arrays[name])
                getattr(layer, name).assign(back(rounded_kernel(matrix)))
    return model


def test_errors_of_rounding_make_up_for_each_other():
    folded = keras_bn.fold(small())
    samples = [[images()[i : i + 1]] for i in range(24)]
    view = ModelView(folded)
    model, of = copy_model(folded, view=view)
    paths = correct(view, of, samples)
    assert paths == ["conv", "depthwise", "project", "inner/strided", "head"]
    # The converter keeps the values: each is on the grid of the largest.
    before = [v.numpy() for v in model.variables]
    for value, old in zip(rounded(model).variables, before, strict=True):
        np.testing.assert_allclose(value, old, rtol=1e-5, atol=1e-9)
    plain = rounded(copy_model(folded)[0])
    assert off(folded, model, "conv") < 0.02 * off(folded, plain, "conv")
    assert off(folded, model, "project") < 0.1 * off(folded, plain, "project")
    expected = folded.predict(images(), verbose=0)
    errors = [error(m.predict(images(), verbose=0), expected) for m in (model, plain)]
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("kind", [*KINDS, "depthwise"])
def test_weights_of_every_kind_are_rounded_on_samples(kind):
    depthwise = (8, 8, 3), lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2)]
    shape, make = KINDS.get(kind, depthwise)
    model = randomized(keras.Sequential([keras.Input(shape), *make()]))
    x = np.cumsum(np.cumsum(images(64, shape) + 1, 1), -1)  # neighbours are alike
    view = ModelView(model)
    copy, of = copy_model(model, view=view)
    assert correct(view, of, [[each[None]] for each in x]) == [model.layers[0].name]
    before, after = model(x).numpy(), copy(x).numpy()
    plain = rounded(copy_model(model)[0])(x).numpy()
    axis = 1 if kind == "channels first" else before.ndim - 1
    others = tuple(i for i in range(before.ndim) if i != axis)
    off_by = np.abs((after - before).mean(others)).max()
    assert off_by < 1e-5 * before.std()
    spreads = [(y - before).std(others).mean() for y in (after, plain)]
    if kind == "einsum":  # there, only the bias makes up for what is lost
        assert spreads[0] == pytest.approx(spreads[1], rel=1e-3)
    else:
        assert spreads[0] < 0.9 * spreads[1]


def test_few_weights_are_rounded_almost_as_well_as_can_be():
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(size=(200, 5)), 1)
    weights, covariance = rng.uniform(-9, 9, (5, 40)), x.T @ x
    weights[2] = -127.0
    whole = round_together(weights[None], covariance[None])[0]
    np.testing.assert_array_equal(whole, np.rint(whole))
    np.testing.assert_array_equal(whole[2], -127)

    def lost(rounded):
        errors = rounded - weights
        return np.einsum("ic,ij,jc->c", errors, covariance, errors)

    steps = [np.insert(s, 2, 0) for s in itertools.product([-1, 0, 1], repeat=4)]
    least = np.min([lost(np.rint(weights) + s[:, None]) for s in steps], 0)
    assert lost(whole).sum() < 1.3 * least.sum()
    assert lost(np.rint(weights)).sum() > 2 * least.sum()


def test_biases_of_layers_in_floats_are_not_corrected(monkeypatch):
    model = small()
    plain = integer_file(model, images())[1]
    assert plain.corrected == ["conv", "depthwise", "project", "inner/strided", "head"]
    assert plain.conversions == 1
    assert integer_file(model, images(), correct_bias=False)[1].corrected == []
    # An operation with its ReLU, which is named, leaves the integers with it.
    report = integer_file(model, images(), keep_float=["conv_relu", "head"])[1]
    assert report.floats == ["conv", "conv_relu", "head"]
    assert report.corrected == ["depthwise", "project", "inner/strided"]
    assert report.conversions == 2
    monkeypatch.setattr("keras_bn.int8.export.CONVERSIONS", 1)
    report = integer_file(model, images(), keep_float=["conv_relu", "head"])[1]
    assert "conv" in report.corrected
    assert report.conversions == 1


class Own(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x) if keras.ops.max(x) > 0 else x


def own():
    model = Own()
    model(np.zeros((1, 8, 8, 3), "float32"))
    return model


def with_last(layer):
    return keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv"), layer], name="model"
    )


def half():
    return keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(2, 3, name="conv", dtype="float16")]
    )


class Pad(layers.Layer):
    """Pads before pooling, as KerasHub's ResNet v2 does."""

    def __init__(self, value, **kwargs):
        super().__init__(**kwargs)
        self.value = value

    def call(self, inputs):
        width = ((0, 0), (1, 1), (1, 1), (0, 0))
        return keras.ops.pad(inputs, width, constant_values=self.value)


def padded(value):
    convolution = layers.Conv2D(4, 3, name="conv")
    pool = layers.MaxPooling2D(3, 2)
    stack = [convolution, Pad(value, name="pad"), pool, layers.Conv2D(2, 1)]
    return keras.Sequential([keras.Input((8, 8, 3)), *stack])


REFUSED = {
    "elu": (lambda: with_last(layers.ELU(name="last")), "'last' of 'model'.*ELU"),
    "inside": (
        lambda: keras.Sequential(
            [keras.Input((8, 8, 3)), with_last(layers.ELU(name="last"))]
        ),
        "'model/last'",
    ),
    "erf": (
        lambda: with_last(layers.Lambda(keras.ops.erf, name="last")),
        "'last'.*Erf",
    ),
    "loop": (
        lambda: keras.Sequential([keras.Input((8, 3)), layers.GRU(2, name="last")]),
        "'last'.*While",
    ),
    "infinite padding": (
        lambda: padded(-np.inf),
        "'pad' are not finite.*padding='same'",
    ),
    "logarithm of zeros": (
        lambda: with_last(
            layers.Lambda(lambda x: keras.ops.log(keras.ops.relu(x)), name="last")
        ),
        r"'last' are not finite, so int8 has no range for them\.$",
    ),
    "division by zero": (
        lambda: with_last(
            layers.Lambda(lambda x: 1.0 / keras.ops.maximum(x, 1e-3), name="last")
        ),
        # Before TensorFlow 2.17 it is the converter that cannot.
        "TFLite cannot run 'last' in int8.*DIV|leaves DIV of 'last' in floats",
    ),
    "subclass": (own, "'own' cannot be a Functional model: "),
    "not built": (lambda: keras.Sequential([layers.Dense(2)], name="m"), "'m' is not"),
    "float16": (half, "'conv' computes in float16"),
}


def normalized(small, large):
    """A normalization that enlarges, and that cannot go into padding after it."""
    norm = keras_bn.BatchNormalization(name="norm")
    y = norm(small)
    norm.moving_mean.assign(np.full(4, 0.5))
    norm.moving_variance.assign(np.full(4, 1e-3))
    return layers.DepthwiseConv2D(3, padding="same")(y) + large


# What is done to a small tensor in place, and makes it large.
IN_PLACE = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "norm": normalized,
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("activation", [slow(None), "relu", slow("gelu")])
def test_what_goes_into_an_operation_in_place_has_a_range_of_its_own(activation, name):
    x = keras.Input((8, 8, 3))
    small = layers.Conv2D(4, 3, activation=activation, name="small")(x)
    large = layers.Conv2D(4, 3, name="large")(50.0 * x)
    y = IN_PLACE[name](small, large)
    model = keras.Model(x, layers.Conv2D(4, 1, name="last")(y))
    report = integer_file(model, images())[1]
    errors = {layer.layer: layer.error for layer in report.layers}
    assert errors["small"] < 0.03


def test_augmentation_does_nothing_in_a_file(tmp_path):
    # These layers train by default: their calls in a graph hold `training=True`.
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.RandomFlip("horizontal"),
            layers.RandomRotation(0.2),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
        ]
    )
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("float32")
    assert keras_bn.export_int8(model, tmp_path / "m.tflite", x).error < 0.05
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


@pytest.mark.parametrize("name", ["_conv", "-conv", "__", "9", ".conv"])
def test_any_name_of_a_layer(name, tmp_path):
    stack = [layers.Conv2D(4, 3, name=name), layers.ReLU(name=f"{name}_relu")]
    model = keras.Sequential([keras.Input((8, 8, 3)), *stack])
    report = keras_bn.export_int8(model, tmp_path / "model.tflite", images(8))
    assert [layer.layer for layer in report.layers] == [name]
    assert report.error < 0.05


def test_padding_with_a_finite_number_is_exported(tmp_path):
    path = tmp_path / "model.tflite"
    assert keras_bn.export_int8(padded(-1.0), path, images(8)).error < 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="there a process is copied")
def test_a_file_that_ends_the_process_is_refused(monkeypatch, tmp_path):
    class Aborting(tflite.Interpreter):
        def run(self, inputs):
            if "int8" in self.operations()[0].dtypes:
                os.abort()
            super().run(inputs)

    monkeypatch.setattr(tflite, "Interpreter", Aborting)
    with pytest.raises(ValueError, match="ends the process that runs it by SIGABRT"):
        keras_bn.export_int8(padded(0.0), tmp_path / "model.tflite", images(4))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="there a process is copied")
def test_no_garbage_is_collected_where_a_file_is_tried(monkeypatch):
    class Tried:
        def __init__(self, content):
            if gc.isenabled():
                os.kill(os.getpid(), signal.SIGKILL)

        def run(self, inputs):
            pass

    monkeypatch.setattr(tflite, "Interpreter", Tried)
    tflite.check_runs(b"", {})
    assert gc.isenabled()


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_layer_and_write_nothing(name, tmp_path):
    make, message = REFUSED[name]
    # TFLite refuses a divisor whose int8 is 0, whatever that stands for.
    data = images(4, (8, 3)) if name == "loop" else images(64)
    path = tmp_path / "model.tflite"
    path.write_text("precious")
    with pytest.raises(ValueError, match=message):
        keras_bn.export_int8(make(), path, data)
    assert path.read_text() == "precious"
    assert [each.name for each in tmp_path.iterdir()] == ["model.tflite"]


def test_refusals_before_any_work(tmp_path):
    model = chain()
    with pytest.raises(ValueError, match=r"quantize_aware.*Give `data`"):
        keras_bn.export_int8(model, tmp_path / "model.tflite")
    with pytest.raises(OSError, match="no folder"):
        keras_bn.export_int8(model, tmp_path / "no" / "model.tflite", images())
    with pytest.raises(TypeError, match="Expected a Keras"):
        keras_bn.export_int8("model", tmp_path / "model.tflite", images())


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_models_that_keras_quantizes():
    """Fold before it and after it, and convert; export what was before it."""
    model = randomized(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3),
                layers.BatchNormalization(name="conv_bn"),
                layers.Flatten(),
                layers.Dense(5, name="dense"),
                layers.BatchNormalization(name="dense_bn"),
            ]
        )
    )
    expected = model.predict(images(), verbose=0)
    folded = keras_bn.fold(model)
    folded.quantize("int8")
    assert error(folded.predict(images(), verbose=0), expected) < 0.05
    model.quantize("int8")
    expected = model.predict(images(), verbose=0)
    after = {each.layer: each for each in keras_bn.plan_fold(model)}
    assert after["conv_bn"].into is not None
    assert "quantized" in after["dense_bn"].reason
    for made in keras_bn.fold(model), keras_bn.from_keras(model):
        assert error(made.predict(images(), verbose=0), expected) < 1e-3
    with pytest.raises(ValueError, match="'dense' is quantized by Keras's"):
        integer_file(model, images())


def test_another_backend_is_told(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"export_int8.*TensorFlow.*'jax'"):
        integer_file(chain(), images())


def mixed():
    """A model with an ELU, for which there are no integers, between convolutions."""
    stack = [
        layers.Conv2D(8, 3, name="conv"),
        layers.ELU(name="elu"),
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(5, name="head"),
    ]
    return keras.Sequential([keras.Input((8, 8, 3)), *stack], name="mixed")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["elu", "el*"])
def test_named_layers_stay_in_floats(bits, pattern):
    options = {"activations": bits, "keep_float": [pattern]}
    content, report = integer_file(mixed(), images(), **options)
    assert report.floats == report.to_dict()["floats"] == ["elu"]
    assert "in part in floats" in str(report)
    assert "in floats: elu" in str(report)
    assert report.error < (0.05 if bits == 8 else 0.01)
    operations = tflite.Interpreter(content).operations()
    floats = {o.name for o in operations if "float32" in o.dtypes}
    assert floats == {"DEQUANTIZE", "ELU", "QUANTIZE"}
    convolution = next(o for o in operations if o.name == "CONV_2D")
    assert f"int{bits}" in convolution.dtypes


def test_activations_of_16_bits_lose_less():
    model = small()
    errors = []
    for bits in 8, 16:
        content, report = integer_file(model, images(), activations=bits)
        assert report.floats == []
        names = set().union(
            *(o.dtypes for o in tflite.Interpreter(content).operations())
        )
        assert not any(name.startswith("float") for name in names)
        errors.append(report.error)
    # What is left is that of the kernels.
    assert errors[1] < 0.8 * errors[0]


def test_16_bits_have_room_for_values_beyond_those_of_the_samples():
    model = small()
    content = integer_file(model, images() / 1.4, activations=16)[0]
    interpreter, values = tflite.Interpreter(content), []
    (index,) = interpreter.outputs().values()
    for image in images():
        interpreter.run({"image": image[None]})
        values.append(interpreter.value(index)[0])
    assert error(np.array(values), model.predict(images(), verbose=0)) < 0.002


def test_layers_that_have_integers_stay_in_floats_where_named():
    model = small()
    options = {"keep_float": ["inner/*", "project", "head"]}
    content, report = integer_file(model, images(), **options)
    assert report.floats == ["project", "inner/strided", "head"]
    operations = tflite.Interpreter(content).operations()
    floats = [o.name for o in operations if o.dtypes == {"float32"}]
    assert floats == ["CONV_2D", "CONV_2D", "FULLY_CONNECTED"]
    integer = integer_file(model, images())[1]
    assert report.error < integer.error
    assert report.size > integer.size
    # The converter cannot do so beside 16 bits.
    wide = integer_file(model, images(), activations=16, **options)[1]
    assert wide.floats == []
    everything = integer_file(model, images(), keep_float=["*"])[1]
    assert everything.error < integer.error


def test_layers_at_outputs_are_found_by_their_outputs():
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(image)
    outputs = [layers.ReLU(name="relu")(x), layers.ELU(name="elu")(x)]
    y = layers.Conv2D(4, 3, activation="relu", name="other")(image)
    model = keras.Model(image, [*outputs, y])
    report = integer_file(model, images(), keep_float=["elu", "other"])[1]
    assert sorted(report.floats) == ["elu", "other"]
    operations = {each.layer: each.operation for each in report.layers}
    assert operations["elu"] == "ELU"
    assert operations["other"] == "CONV_2D"


def test_without_the_private_name_of_tensorflow_integers_alone_are_written(monkeypatch):
    from keras_bn.backends.tensorflow import private

    monkeypatch.setattr(private, "_lite", None)
    integer_file(chain(), images(4))
    with pytest.raises(
        RuntimeError, match=r"^`keep_float` and `lose` need a TensorFlow"
    ):
        integer_file(chain(), images(4), keep_float=["last"])


def spoiled():
    """A chain in which one channel is so large that int8 has no room for the others."""
    model = chain()
    conv, depthwise = model.get_layer("conv"), model.get_layer("depthwise")
    factor = np.ones(8, "float32")
    factor[0] = 300.0
    conv.kernel.assign(conv.kernel * factor)
    conv.bias.assign(conv.bias * factor)
    depthwise.kernel.assign(depthwise.kernel / factor[:, None])
    return model


@functools.cache
def labelled():
    """A spoiled model, and labels that it is right about."""
    model = spoiled()
    return model, images(96), model.predict(images(96), verbose=0).argmax(-1)


def test_what_a_layer_adds_to_the_error_is_told():
    model, x, _ = labelled()
    report = integer_file(model, x)[1]
    added = {each.layer: each.added for each in report.layers}
    assert added["conv"] < 0.3 * added["depthwise"]
    for each in report.layers:
        assert 0 <= each.added <= each.error
    first = next(each for each in report.layers if each.layer == "conv")
    assert first.added == first.error
    assert any(each.added < 0.5 * each.error for each in report.layers)


def test_layers_stay_in_floats_until_little_is_lost(tmp_path):
    model, x, y = labelled()
    path = tmp_path / "model.tflite"
    report = keras_bn.export_int8(model, path, (x, y), lose=0.02)
    assert report.scores["float"] == 1.0
    assert report.scores["int8"] < 0.9
    assert report.scores["file"] >= 0.98
    assert "depthwise" in report.raised
    assert len(report.raised) < len(report.layers)
    assert 1 < report.conversions <= 8
    integer = integer_file(model, x)[1]
    worst = sorted(integer.layers, key=lambda each: -each.added)
    assert list(report.raised) == [each.layer for each in worst][: len(report.raised)]
    assert report.larger == pytest.approx(report.size / integer.size)
    assert report.slower > 0
    for said in (
        "kept in floats for it: ",
        "times as large",
        "metric: 1 in",
    ):
        assert said in str(report)
    assert report.to_dict()["raised"] == report.raised
    # One-hot labels, and integers alone where these are good enough.
    wide = integer_file(model, (x, np.eye(4)[y]), lose=0.9)[1]
    assert (wide.raised, wide.floats, wide.conversions) == ({}, [], 1)
    assert wide.scores["file"] == wide.scores["int8"] == report.scores["int8"]


def test_any_metric_and_a_bound_that_nothing_reaches():
    model, x, _ = labelled()
    expected = model.predict(x, verbose=0)

    def metric(labels, outputs):
        assert labels.shape == (96,)
        return -np.abs(outputs - expected).max()

    with pytest.raises(
        ValueError, match=r"No file of .* loses at most 0: the metric is"
    ):
        integer_file(model, (x, np.zeros(96)), lose=0.0, metric=metric)


def test_refusals_of_lose():
    model, x, y = labelled()
    for lose in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`lose` must be a number, 0 or greater"):
            integer_file(model, (x, y), lose=lose)
    with pytest.raises(ValueError, match=r"`lose` needs labels.*`\(x, y\)`"):
        integer_file(model, x, lose=0.1)
    with pytest.raises(ValueError, match=r"`lose` is for 8 bits only.*activations=16"):
        integer_file(model, (x, y), lose=0.1, activations=16)
    two = keras.Model(model.inputs, [model.outputs[0], model.layers[0].output])
    with pytest.raises(ValueError, match=r"one output.*Give another `metric`"):
        integer_file(two, (x, y), lose=0.1)


def test_what_may_stay_in_floats_is_named_rightly():
    model = mixed()
    for bits in 8, 16:
        with pytest.raises(ValueError, match="integer"):
            integer_file(model, images(), activations=bits)
        with pytest.raises(ValueError, match="'elu'"):
            integer_file(model, images(), activations=bits, keep_float=["conv"])
    with pytest.raises(ValueError, match="names 'gelu', and 'mixed' computes no such"):
        integer_file(model, images(), keep_float=["gelu"])
    with pytest.raises(ValueError, match="must be a list"):
        integer_file(model, images(), keep_float="elu")
    with pytest.raises(ValueError, match="must be 8 or 16"):
        integer_file(model, images(), activations=4)


def test_models_and_operations_stay_in_floats_by_name():
    image = keras.Input((8, 8, 3))
    x = keras.ops.softplus(layers.Conv2D(2, 3, name="conv")(image))
    inner = keras.Model(image, layers.ReLU(name="relu")(x), name="inner")
    parts = layers.TimeDistributed(layers.Dense(3, name="dense"), name="parts")
    model = keras.Model(image, layers.Flatten()(parts(inner(image))), name="outer")
    for names, floats in (
        (["inner"], {"inner/conv", "inner/softplus", "inner/relu"}),
        (["inner/soft*", "parts/dense"], {"inner/softplus", "parts"}),
    ):
        found = integer_file(model, images(4), keep_float=names)[1].floats
        assert set(found) == floats
    for name in ("outer", image.name):
        with pytest.raises(ValueError, match=f"names '{name}', and 'outer' computes"):
            integer_file(model, images(4), keep_float=[name])
    erf = with_last(layers.Lambda(keras.ops.erf, name="erf"))
    with pytest.raises(ValueError, match=r"'erf'.*is exported\.$"):
        integer_file(erf, images(4), keep_float=["erf"])


def batches_of(labels):
    """Batches of eight samples, with labels from a function of their number."""
    return ((images()[8 * i : 8 * i + 8], labels(i)) for i in range(3))


@pytest.mark.parametrize(
    "labels", [lambda i: np.zeros((8, i + 1)), lambda i: np.float32(0)]
)
def test_labels_are_read_for_lose_alone(labels):
    assert integer_file(chain(), batches_of(labels), steps=3)[1].samples == 24
    with pytest.raises(ValueError, match="labels of the batches in `data` do not make"):
        integer_file(chain(), batches_of(labels), steps=3, lose=0.1)


def test_labels_by_the_name_of_the_output():
    model, x, y = labelled()
    report = integer_file(model, (x, {"last": y[:, None]}), lose=0.9)[1]
    assert report.scores["float"] == 1.0


def test_arguments_of_another_kind():
    model, x, y = labelled()
    for data, options, message in (
        ((x, y, None, None), {}, "`data` is .*a tuple of 4"),
        ((x, y), {"lose": "0.1"}, "`lose` must be a number.*lose='0.1'"),
        ((x, y), {"lose": 0.1, "metric": "auc"}, "`metric` must be a function.*'auc'"),
        ((x, y), {"metric": max}, "`metric` is for `lose`"),
        ((x, y), {"lose": 0.1, "metric": lambda y, _: y}, r"a number.*shape \(96,\)"),
        ((x, y[:, None] + [0, 1]), {"lose": 0.1}, "a label for each of its samples"),
        (x, {"keep_float": None}, "a list of paths .*None"),
        (x, {"keep_float": [1]}, r"a list of paths .*\[1\]"),
        (x, {"keep_float": iter(["last"])}, "a list of paths"),
    ):
        with pytest.raises(ValueError, match=message):
            integer_file(model, data, **options)
    a, b = keras.Input((4,)), keras.Input((4,))
    two = keras.Model([a, b], layers.Add()([a, b]))
    with pytest.raises(ValueError, match=r"2 inputs.*`\(x, y\)`\. Received: 1 inputs"):
        integer_file(two, (np.ones((4, 4)), np.ones((4, 4))))


def test_a_shared_layer_adds_what_it_adds_most():
    added = [("shared", 0.5), ("other", 0.2), ("shared", 0.0)]
    found = [Int8Layer(name, name, "ADD", 0.5, part) for name, part in added]

    def written(paths):
        return Int8Report("m", 1, 1, False, {}, found), paths

    class Score:
        floats = 1.0
        __call__ = staticmethod(lambda paths: float("shared" in paths))
        slower = staticmethod(lambda _, __: 1.0)

    report, _ = raised(written(set()), written, Score(), 0.0)
    assert report.raised == {"shared": 0.5}


@pytest.mark.parametrize("each", [1, 2, 3])
def test_there_are_eight_conversions_at_most(each):
    """Each file may take several, as one with an operation that is in floats whole."""
    names = [f"layer_{i}" for i in range(200)]
    found = [Int8Layer(name, name, "ADD", 0.5, 0.5) for name in names]
    count = 0

    def written(paths):
        nonlocal count
        assert count < 8
        count = min(count + each, 8)
        return Int8Report("m", 1, 1, False, {}, found, conversions=count), paths

    class Score:
        floats = 1.0
        __call__ = staticmethod(lambda paths: float(len(paths) > 20))
        slower = staticmethod(lambda _, __: 1.0)

    report, paths = raised(written(set()), written, Score(), 0.0)
    assert report.conversions == count == 8
    assert 20 < len(paths) == len(report.raised)
    assert each > 1 or len(paths) < 23


def test_parallel_branches_and_concatenations(tmp_path):
    def norm(name, x):
        return keras_bn.BatchNormalization(name=name)(x)

    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 1, activation="relu", name="stem")(image)
    c3 = norm("b3", layers.Conv2D(6, 3, padding="same", name="c3")(x))
    c1 = norm("b1", layers.Conv2D(6, 1, name="c1")(x))
    x = layers.ReLU()(layers.Add()([c3, c1, norm("skip", x)]))
    parts = [layers.Conv2D(4, n, padding="same", name=f"p{n}")(x) for n in (1, 3)]
    x = layers.ReLU()(norm("join", layers.Concatenate()(parts)))
    model = keras.Model(image, layers.GlobalAveragePooling2D(name="pool")(x))
    path = tmp_path / "model.tflite"
    report = keras_bn.export_int8(randomized(model), path, images())
    named = {each.layer for each in report.layers if each.operation == "CONV_2D"}
    assert named == {"stem", "c3", "p1", "p3"}
    assert report.error < 0.1
