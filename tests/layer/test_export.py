"""Models converted to TFLite and ONNX give the same, and nothing slows them down."""

import collections
import warnings

import keras
import numpy as np
import pytest
from conftest import require
from support import backend
from support.forms import conv_model, examples, randomize
from support.steps import relative_error

import keras_bn

tf = backend.tensorflow("TFLite and ONNX files are made by it")


def conv_bn_relu():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, use_bias=False),
            keras_bn.BatchNormalization(),
            layers.ReLU(),
        ]
    )
    randomize(model.layers[1])
    return model


def with_dense():
    model = conv_model()
    for layer in model.layers:
        if isinstance(layer, keras_bn.BatchNormalization):
            randomize(layer)
    return model


MODELS = [conv_bn_relu, with_dense]


def assert_same(got, want):
    """Equal but for rounding: what is folded is summed in another order."""
    assert got.shape == want.shape
    assert relative_error(got, want) < 16 * np.finfo("float32").eps


def to_tflite(model, path, calibrated_on=None):
    """A TFLite interpreter of the exported model; in int8 if data is given for that."""
    model.export(path, verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(path))
    if calibrated_on is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([x[None]] for x in calibrated_on)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converted = converter.convert()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tf.lite.Interpreter is deprecated")
        return tf.lite.Interpreter(model_content=converted)


def run_tflite(interpreter, x):
    (taken,), (given,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    interpreter.resize_tensor_input(taken["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(given["index"])


def operators(interpreter):
    """The operators of a TFLite file, sorted."""
    details = interpreter._get_ops_details()
    return sorted(op["op_name"] for op in details if op["op_name"] != "DELEGATE")


@pytest.mark.slow
def test_a_normalization_that_stays_costs_what_keras_costs(tmp_path):
    """One product and one sum, after a ReLU that it can't be folded into."""
    costs = []
    for cls in (keras.layers.BatchNormalization, keras_bn.BatchNormalization):
        layers = [keras.Input((8, 8, 3)), keras.layers.ReLU(), cls()]
        model = keras.Sequential(layers)
        randomize(model.layers[1])
        costs.append(operators(to_tflite(model, tmp_path / cls.__module__)))
    assert costs[0] == costs[1] == ["ADD", "MUL", "RELU"]


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_int8_is_as_accurate_as_with_keras_layer(tmp_path, folded):
    """A normalization after an activation stays, and is quantized as it stands."""
    layers, rng = keras.layers, np.random.default_rng(0)
    x = rng.normal(0.0, 1.0, (64, 8, 8, 4)).astype("float32")
    errors = []
    for cls in keras.layers.BatchNormalization, keras_bn.BatchNormalization:
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((8, 8, 4)), layers.Conv2D(8, 3), layers.ReLU(), cls(name="bn")]
        )
        randomize(model.get_layer("bn"))
        model = keras_bn.fold(model) if folded else model
        assert isinstance(model.layers[-1], cls)
        interpreter = to_tflite(model, tmp_path / cls.__module__, calibrated_on=x)
        got = np.concatenate([run_tflite(interpreter, each[None]) for each in x])
        errors.append(relative_error(got, model(x).numpy()))
    assert 0 < errors[1] <= 1.05 * errors[0] < 0.2


@pytest.mark.parametrize("make", MODELS)
def test_tflite_gives_the_same(make, tmp_path):
    model = make()
    interpreter = to_tflite(model, tmp_path)
    for batch in (1, 7):
        x = examples((8, 8, 3), batch)
        assert_same(run_tflite(interpreter, x), model(x).numpy())


def test_tflite_folds_the_layer_into_the_convolution(tmp_path):
    operations = to_tflite(conv_bn_relu(), tmp_path)._get_ops_details()
    assert [o["op_name"] for o in operations] == ["CONV_2D"]


def to_onnx(model, path):
    """The model as an ONNX file."""
    tf2onnx = require("tf2onnx")
    signature = [tf.TensorSpec(model.inputs[0].shape, tf.float32, name="x")]
    serve = tf.function(lambda x: model(x, training=False), signature)
    tf2onnx.convert.from_function(serve, signature, output_path=str(path))


def open_onnx(path, optimized=None):
    """A session of onnxruntime, which may write down what it makes of the graph."""
    runtime = require("onnxruntime")
    settings = runtime.SessionOptions()
    if optimized is not None:
        levels = runtime.GraphOptimizationLevel
        settings.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        settings.optimized_model_filepath = str(optimized)
    return runtime.InferenceSession(str(path), settings)


@pytest.mark.parametrize("make", MODELS)
def test_onnx_gives_the_same(make, tmp_path):
    model = make()
    to_onnx(model, tmp_path / "model.onnx")
    session = open_onnx(tmp_path / "model.onnx")
    for batch in (1, 7):
        x = examples((8, 8, 3), batch)
        (y,) = session.run(None, {"x": x})
        assert_same(y, model(x).numpy())


def test_onnxruntime_folds_the_layer_into_the_convolution(tmp_path):
    onnx = require("onnx")
    to_onnx(conv_bn_relu(), tmp_path / "model.onnx")
    optimized = tmp_path / "optimized.onnx"
    open_onnx(tmp_path / "model.onnx", optimized)
    operations = collections.Counter(n.op_type for n in onnx.load(optimized).graph.node)
    assert operations["Conv"] + operations["FusedConv"] == 1
    assert not {"Add", "Sub", "Mul"} & set(operations), operations


LARGE = (16, 32, 32, 16)


class Trainer(tf.Module):
    """One normalization of large images, and its training step as a signature."""

    def __init__(self, bn, axis=-1):
        super().__init__()
        self.layer = bn(axis=axis)
        self.layer.build(LARGE)
        randomize(self.layer)

    @tf.function(
        input_signature=[tf.TensorSpec(LARGE, name="x"), tf.TensorSpec(LARGE, name="g")]
    )
    def train(self, x, g):
        weights = [self.layer.gamma.value, self.layer.beta.value]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = self.layer(x, training=True)
        dx, *gradients = tape.gradient(y, [x, *weights], g)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.assign_sub(0.01 * gradient)
        return {"y": y, "dx": dx, "mean": self.layer.moving_mean.value}


def inputs_of_a_step():
    rng = np.random.default_rng(2)
    return (rng.normal(1, 2, LARGE).astype("float32") for _ in range(2))


def signatures_of_tflite(trainer, path, *kinds):
    """A TFLite interpreter of the training step, of operators of these kinds."""
    signature = {"train": trainer.train.get_concrete_function()}
    tf.saved_model.save(trainer, str(path), signature)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(path))
    converter.experimental_enable_resource_variables = True
    converter.target_spec.supported_ops = list(kinds)
    content = converter.convert()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tf.lite.Interpreter is deprecated")
        return tf.lite.Interpreter(model_content=content)


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_training_step_is_a_signature_of_tflite(axis, tmp_path):
    """With the operators that TensorFlow's guide to training on a device asks for."""
    # The mean of the first elements is added up in float64, which TFLite leaves to it.
    kinds = tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS
    trainer = Trainer(keras_bn.BatchNormalization, axis)
    interpreter = signatures_of_tflite(trainer, tmp_path, *kinds)
    signature = {"inputs": ["g", "x"], "outputs": ["dx", "mean", "y"]}
    assert interpreter.get_signature_list() == {"train": signature}
    selected = {name for name in operators(interpreter) if name.startswith("Flex")}
    fused = {"FlexFusedBatchNormV3", "FlexFusedBatchNormGradV3"}
    assert selected == {*fused, "FlexMean"}


def test_kerass_layer_needs_no_operators_but_tflites_own(tmp_path):
    """What the FAQ says of `to_keras`."""
    trainer = Trainer(keras_bn.BatchNormalization)
    trainer.layer = keras_bn.to_keras(trainer.layer)
    kinds = [tf.lite.OpsSet.TFLITE_BUILTINS]
    interpreter = signatures_of_tflite(trainer, tmp_path, *kinds)
    assert not [name for name in operators(interpreter) if name.startswith("Flex")]


@pytest.mark.parametrize(
    "bn", [keras.layers.BatchNormalization, keras_bn.BatchNormalization]
)
def test_a_training_step_is_a_graph_of_onnx(bn, tmp_path):
    tf2onnx = require("tf2onnx")
    trainer = Trainer(bn)

    def forward(x):
        return trainer.layer(x, training=True)

    x, _ = inputs_of_a_step()
    signature = [tf.TensorSpec(LARGE, name="x")]
    path = tmp_path / "model.onnx"
    function = tf.function(forward, signature)
    tf2onnx.convert.from_function(function, signature, output_path=str(path))
    (y,) = open_onnx(path).run(None, {"x": x})
    assert relative_error(y, forward(x).numpy()) < 1e-5


def test_a_missing_package_skips_a_test_but_not_in_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_package"):
        require("no_such_package")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no_such_package"):
        require("no_such_package")
