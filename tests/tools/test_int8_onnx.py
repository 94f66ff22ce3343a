"""Files of integers for ONNX's runtimes: the integers of TFLite, run by onnxruntime."""

import sys

import applications
import keras
import numpy as np
import pytest
from keras import layers
from support import backend
from support.marks import mostly_slow, slow, takes_fake_quantization
from support.zoo import randomized

import keras_bn
from keras_bn.int8 import tflite
from keras_bn.int8.export import integer_file

backend.tensorflow("its converter writes these files")
onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("tf2onnx")

from test_int8 import KINDS, error, images, mixed, small, with_last  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded")
# Kernels of these cannot be integers in onnxruntime.
FLOATS = {"transposed": "ConvTranspose"}


def session(content, **config):
    """A session of onnxruntime, and the kinds of operations that it runs."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    options.optimized_model_filepath = str(session.folder / "optimized.onnx")
    made = runtime.InferenceSession(content, options, ["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    return made, [node.op_type for node in graph.node]


@pytest.fixture(autouse=True)
def folder(tmp_path):
    session.folder = tmp_path


def run(content, x, **config):
    """The output of a file, one sample after the other, by onnxruntime alone."""
    made, kinds = session(content, **config)
    (given,) = made.get_inputs()
    assert given.type == "tensor(float)"
    return np.concatenate([made.run(None, {given.name: e[None]})[0] for e in x]), kinds


def of_tflite(content, x):
    """The output of a `.tflite` file, and the step between two of its values."""
    interpreter = tflite.Interpreter(content)
    ((_, index),), (given,) = interpreter.outputs().items(), interpreter.inputs()
    found = []
    for each in x:
        interpreter.run({given: each[None]})
        found.append(interpreter.value(index))
    return np.concatenate(found), interpreter.tensors[index]["quantization"][0]


def check(model, x, files=None, same=0.9, most=2, in_floats=None):
    """The file computes what that of TFLite does, but for ties, and in integers."""
    integers, (content, report) = files or both(model, x)
    value, kinds = run(content, x)
    expected, step = of_tflite(integers[0], x)
    off = np.abs(value - expected) / step
    assert off.max() < most + 0.1
    assert np.mean(off < 0.5) > same
    floats = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "MatMul"} - {in_floats}
    assert not floats & set(kinds)
    of_model = model.predict(x, verbose=0)
    assert error(value, of_model) <= 1.1 * error(expected, of_model)
    assert report.error == pytest.approx(error(value, of_model), rel=1e-3, abs=1e-6)
    assert report.size == len(content)


def both(model, x):
    """The files of a model for TFLite and for ONNX, with their reports."""
    return integer_file(model, x), integer_file(model, x, suffix=".onnx")


@pytest.fixture(scope="module")
def shared():
    """A model and its files. No test changes it."""
    keras.utils.set_random_seed(0)
    return (model := small()), both(model, images())


def one_of(kind):
    shape, make = KINDS[kind]
    bn = keras_bn.BatchNormalization(axis=1 if kind == "channels first" else -1)
    stack = [keras.Input(shape), *make(), bn, layers.ReLU(6.0)]
    return randomized(keras.Sequential(stack)), images(16, shape)


@pytest.mark.parametrize("kind", mostly_slow(KINDS, {"dense", "transposed"}))
def test_linear_layers_of_every_kind(kind):
    check(*one_of(kind), in_floats=FLOATS.get(kind))


def test_a_whole_network(shared):
    model, files = shared
    check(model, images(), files, same=0.8)
    of_tflite, of_onnx = (
        {each.layer: (each.output, each.operation) for each in report.layers}
        for _, report in files
    )
    assert of_tflite == of_onnx
    first, second = (
        {each.layer: each.error for each in report.layers} for _, report in files
    )
    assert first == pytest.approx(second, rel=0.2)


def test_the_file_is_whole(shared, tmp_path):
    path = tmp_path / "model.onnx"
    model, (_, (_, report)) = shared
    assert keras_bn.export_int8(model, path, images()).layers == report.layers
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    ends = *loaded.graph.input, *loaded.graph.output
    assert [each.name for each in ends] == ["image", "head"]


def test_kernels_biases_and_activations_have_their_types(shared):
    _, (_, (content, _)) = shared
    graph = onnx.load_from_string(content).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    maker = {node.output[0]: node for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 4
    for node in convolutions:
        x, kernel, bias = (maker[name].input for name in node.input)
        assert arrays[x[2]].dtype == np.uint8
        assert arrays[kernel[0]].dtype == np.int8
        assert arrays[bias[0]].dtype == np.int32
        assert not arrays[kernel[2]].any()
        assert arrays[kernel[1]].shape == arrays[bias[1]].shape
        scales = arrays[x[1]] * arrays[kernel[1]]
        np.testing.assert_allclose(arrays[bias[1]], scales, rtol=1e-6)


@pytest.mark.parametrize("kind", ["small", "dense", slow("grouped"), slow("conv1d")])
def test_symmetric_activations(kind):
    model, x = (small(), images()) if kind == "small" else one_of(kind)
    content, report = integer_file(model, x, suffix=".onnx", symmetric=True)
    graph = onnx.load_from_string(content).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type.endswith("izeLinear"):
            zero = arrays[node.input[2]]
            assert zero.dtype in ("int8", "int32")
            assert not zero.any()
    value, kinds = run(content, x, qdqisint8allowed="1")
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(kinds)
    of_model = model.predict(x, verbose=0)
    # Half of the values of a ReLU's output are not used.
    assert error(value, of_model) < 0.04
    assert report.error == pytest.approx(error(value, of_model), rel=0.1)


def test_a_bound_that_the_rounding_does_not_have():
    """A ReLU6 whose values are so small that the converter rounds below 0 too."""
    tiny = keras.initializers.RandomNormal(stddev=1e-9)
    stack = [layers.Conv2D(4, 3, kernel_initializer=tiny), layers.ReLU(6.0)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *stack, layers.Conv2D(4, 3)])
    check(model, images(), same=0.5, most=3)


@takes_fake_quantization
def test_a_model_from_training(tmp_path):
    aware = keras_bn.quantize_aware(small(), images(32), batch_size=16)
    report = keras_bn.export_int8(aware, tmp_path / "model.onnx")
    assert report.drawn
    content = (tmp_path / "model.onnx").read_bytes()
    value, kinds = run(content, images())
    assert "Conv" not in kinds
    step = of_tflite(integer_file(aware)[0], images())[1]
    off = np.abs(value - aware(images(), training=False).numpy()) / step
    assert off.max() < 5.1
    assert np.mean(off < 0.5) > 0.4


def test_several_inputs_and_outputs_and_one_twice():
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    y = layers.Dense(2)(layers.Concatenate()([layers.Dense(3)(b), a]))
    model = keras.Model({"b": b, "a": a}, {"y": y, "z": layers.Dense(3)(a), "again": y})
    data = {"b": images(32, (4,)), "a": images(32, (6,))}
    content, report = integer_file(model, data, suffix=".onnx")
    made, _ = session(content)
    assert {each.name for each in made.get_inputs()} == {"a", "b"}
    assert [each.name for each in made.get_outputs()] == list(report.outputs)
    assert len(report.outputs) == 3
    assert max(report.outputs.values()) < 0.05


@pytest.mark.parametrize("symmetric", [False, True])
def test_embeddings(symmetric):
    words = keras.Input((5,), dtype="int32")
    embedded = layers.Embedding(10, 4, name="words")(words)
    same = layers.Concatenate()([embedded, layers.Permute((1, 2))(embedded)])
    model = keras.Model(words, layers.Dense(3)(layers.Flatten()(same)))
    x = np.random.default_rng(0).integers(0, 10, (40, 5))
    _, report = integer_file(model, x, suffix=".ONNX", symmetric=symmetric)
    assert report.error < 0.02


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu(approximate):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="first")(inputs)
    x = keras.ops.gelu(x, approximate=approximate)
    norm = keras_bn.BatchNormalization(name="norm")
    x = layers.Conv2D(4, 3, padding="same", name="second")(norm(x))
    norm.moving_mean.assign(np.full(4, 0.1))
    norm.moving_variance.assign(np.full(4, 1e-2))
    check(keras.Model(inputs, x), images())


def test_layers_in_floats():
    content, report = integer_file(
        mixed(), images(), keep_float=["elu"], suffix=".onnx"
    )
    _, kinds = session(content)
    assert report.floats == ["elu"]
    assert "Elu" in kinds
    assert "Conv" not in kinds
    assert report.error < 0.05


def test_tflite_reads_the_file_once(monkeypatch):
    made = []

    class Counted(tflite.Interpreter):
        def __init__(self, content):
            made.append(content)
            super().__init__(content)

    monkeypatch.setattr(tflite, "Interpreter", Counted)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    integer_file(model, images(8, (4,)), suffix=".onnx")
    assert len(made) == 2  # the file of floats that ranges are measured in, and its own


def test_refusals(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    gelu = with_last(layers.Activation("gelu", name="last"))
    with monkeypatch.context() as patch:
        patch.setattr(keras_bn.int8.onnx, "_GELU", "another")
        with pytest.raises(ValueError, match=r"'last' of 'model': ONNX has no GELU"):
            keras_bn.export_int8(gelu, path, images(4))
    with pytest.raises(ValueError, match=r"`activations` must be 8 for an `\.onnx`"):
        keras_bn.export_int8(small(), path, images(4), activations=16)
    with pytest.raises(ValueError, match=r"`symmetric` is for .*ends in '\.tflite'"):
        keras_bn.export_int8(
            small(), tmp_path / "model.tflite", images(4), symmetric=True
        )
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ImportError, match=r"pip install keras_bn\[onnx\]"):
        keras_bn.export_int8(small(), path, images(4))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "aware"),
    [("MobileNet", True), ("MobileNetV2", False), ("ResNet50", False)],
)
def test_applications(name, aware):
    model, x = applications.build(name), images(16, (32, 32, 3))
    if aware:
        model = keras_bn.quantize_aware(model, x)
    # Fifty layers add up roundings of values that are half way between two.
    check(model, x, same=0.2, most=10)
