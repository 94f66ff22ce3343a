"""fold and plan_fold: gone, and nothing else changed; refused, and why."""

import keras
import numpy as np
import pytest
from conftest import require
from keras import layers
from support.backend import KERAS_IS_A_JUDGE, array, tf
from support.marks import slow
from support.zoo import GRAPHS, Subclassed, inputs_of, randomized

import keras_bn
from keras_bn.surgery.graph import walk
from keras_bn.surgery.norms import is_normalization

OURS = keras_bn.BatchNormalization
KERAS = layers.BatchNormalization


pytestmark = pytest.mark.usefixtures("seeded")


def norms(model):
    return [path for path, layer in walk(model) if is_normalization(layer)]


def relative_error(a, b):
    """The largest difference, relative to the spread of the output."""
    worst = 0.0
    for mine, theirs in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        mine, theirs = array(mine), array(theirs)
        worst = max(worst, np.abs(mine - theirs).max() / mine.std())
    return worst


def check(model, left=0, tolerance=1e-5):
    """Fold, compare outputs and count; returns the folded model."""
    before = [v.numpy() for v in model.variables]
    plan = keras_bn.plan_fold(model)
    assert sorted(each.layer for each in plan) == sorted(norms(model))
    folded = keras_bn.fold(model)
    x = inputs_of(model)
    assert relative_error(model(x, training=False), folded(x)) < tolerance
    for variable, was in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), was)
    stays = [each.layer for each in plan if each.into is None]
    # Layers that were opened are no longer around those that stay.
    names = [path.rpartition("/")[2] for path in stays]
    assert [path.rpartition("/")[2] for path in norms(folded)] == names
    assert len(stays) == left, [str(each) for each in plan]
    assert type(folded) is type(model)
    return folded


def chain(shape, *stack):
    model = keras.Sequential([keras.Input(shape), *stack])
    return randomized(model)


VECTOR, LINE = (6,), (9, 6)
IMAGE, VOLUME = (9, 8, 6), (5, 6, 4, 4)


@pytest.mark.parametrize("bn", [OURS, slow(KERAS)])
@pytest.mark.parametrize("bias", [True, slow(False)])
@pytest.mark.parametrize(
    ("shape", "make"),
    [
        (VECTOR, lambda b: layers.Dense(4, use_bias=b)),
        (LINE, lambda b: layers.Dense(4, use_bias=b)),
        (LINE, lambda b: layers.Conv1D(4, 3, padding="causal", use_bias=b)),
        (IMAGE, lambda b: layers.Conv2D(4, 3, strides=2, padding="same", use_bias=b)),
        (IMAGE, lambda b: layers.Conv2D(6, 3, groups=2, use_bias=b)),
        (VOLUME, lambda b: layers.Conv3D(3, 2, use_bias=b)),
        (LINE, lambda b: layers.Conv1DTranspose(4, 3, strides=2, use_bias=b)),
        (IMAGE, lambda b: layers.Conv2DTranspose(4, 3, padding="same", use_bias=b)),
        (VOLUME, lambda b: layers.Conv3DTranspose(3, 2, use_bias=b)),
        (LINE, lambda b: layers.DepthwiseConv1D(3, depth_multiplier=2, use_bias=b)),
        (IMAGE, lambda b: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=b)),
        (LINE, lambda b: layers.SeparableConv1D(4, 3, use_bias=b)),
        (IMAGE, lambda b: layers.SeparableConv2D(4, 3, depth_multiplier=2, use_bias=b)),
        (
            LINE,
            lambda b: layers.EinsumDense(
                "abc,cde->abde", (9, 2, 3), bias_axes="de" if b else None
            ),
        ),
        (
            IMAGE,
            lambda b: layers.EinsumDense(
                "...ab,bc->...ac", (8, 5), bias_axes="a" if b else None
            ),
        ),
    ],
)
def test_into_every_linear_layer_before(shape, make, bias, bn):
    folded = check(chain(shape, make(bias), bn(), layers.ReLU(), layers.Flatten()))
    assert len(folded.layers) == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "make"),
    [
        (VECTOR, lambda b: layers.Dense(4, "relu", use_bias=b)),
        (IMAGE, lambda b: layers.Dense(4, "relu", use_bias=b)),
        (LINE, lambda b: layers.Conv1D(4, 3, dilation_rate=2, use_bias=b)),
        (IMAGE, lambda b: layers.Conv2D(4, 3, strides=2, use_bias=b)),
        (IMAGE, lambda b: layers.Conv2D(8, 3, groups=2, use_bias=b)),
        (IMAGE, lambda b: layers.Conv2D(4, 1, strides=2, padding="same", use_bias=b)),
        (VOLUME, lambda b: layers.Conv3D(3, 2, use_bias=b)),
        (LINE, lambda b: layers.DepthwiseConv1D(3, depth_multiplier=2, use_bias=b)),
        (IMAGE, lambda b: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=b)),
        (IMAGE, lambda b: layers.SeparableConv2D(4, 3, depth_multiplier=2, use_bias=b)),
        (
            LINE,
            lambda b: layers.EinsumDense(
                "abc,cde->abde", (9, 2, 3), bias_axes="e" if b else None
            ),
        ),
        (
            LINE,
            lambda b: layers.EinsumDense(
                "abc,bcd->ad", 3, bias_axes="d" if b else None, activation="relu"
            ),
        ),
    ],
)
def test_into_every_linear_layer_after(shape, make, bias):
    folded = check(chain(shape, layers.ReLU(), OURS(), make(bias)))
    assert len(folded.layers) == 2


@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}])
def test_norm_after_norm(options):
    check(chain(IMAGE, layers.Conv2D(4, 3), OURS(**options), KERAS(), OURS()))
    check(chain(IMAGE, layers.ReLU(), OURS(**options), KERAS()), left=1)
    check(chain(IMAGE, layers.ReLU(), KERAS(**options), OURS(), layers.Conv2D(3, 3)))
    # Both sides of one layer, and the einsum's and the norm's own other axes.
    check(chain(IMAGE, layers.ReLU(), OURS(), layers.Conv2D(4, 3), OURS()))
    check(chain(LINE, layers.ReLU(), OURS(axis=1), OURS(axis=1)), left=1)
    check(chain(LINE, layers.ReLU(), OURS(axis=[1, 2]), OURS(axis=[1, 2])), left=1)


def test_channels_first():
    options = {"data_format": "channels_first"}
    stack = layers.Conv2D(4, 3, **options), OURS(axis=1), layers.ReLU()
    check(chain((3, 9, 8), *stack, OURS(axis=1), layers.Conv2D(2, 3, **options)))
    check(chain((3, 9, 8), layers.DepthwiseConv2D(3, **options), OURS(axis=1)))
    model = chain((6, 8, 8), layers.Conv2D(6, 3, **options, name="conv"), OURS(axis=-1))
    check(model, left=1)
    assert "'conv' has its channels on axis 1" in keras_bn.plan_fold(model)[0].reason


@pytest.mark.parametrize(
    "options",
    [
        {"renorm": True},
        {"virtual_batch_size": 2},
        {"unbiased": True, "debias": True},
        {"momentum": None},
        {"freeze_statistics": True},
        {"trainable": False},
    ],
)
def test_options_fold_by_their_inference_form(options):
    stack = layers.Dense(4), OURS(**options), layers.ReLU()
    check(chain(VECTOR, *stack, OURS(**options), OURS()), left=1)


def test_arithmetic_is_in_float64_and_dtypes_stay():
    half = keras.dtype_policies.DTypePolicy("mixed_float16")
    model = chain(VECTOR, layers.Dense(4, dtype=half), OURS(dtype=half))
    folded = check(model, tolerance=2e-2)
    assert folded.layers[0].kernel.dtype == "float32"
    assert folded.layers[0].compute_dtype == "float16"
    double = chain(VECTOR, layers.Dense(4, dtype="float64"), OURS(dtype="float64"))
    check(double, tolerance=1e-14 if KERAS_IS_A_JUDGE else 1e-6)


@pytest.mark.parametrize(
    ("make", "left"), zip(GRAPHS, [0, 0, 2, 1, 2, 3, 4], strict=True)
)
def test_every_kind_of_model(make, left):
    check(randomized(make()), left)


def test_subclassed_models_are_folded():
    model = Subclassed()
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    model(x)
    folded = keras_bn.fold(randomized(model))
    assert (len(norms(model)), norms(folded)) == (3, [])
    assert relative_error(model(x), folded(x)) < 1e-5


def functional(build):
    x = keras.Input((8, 8, 4), name="image")
    return randomized(keras.Model(x, build(x)))


def second_consumer(x):
    y = layers.Conv2D(4, 3, padding="same", name="conv")(x)
    return layers.Add(name="sum")([OURS(name="bn")(y), y])


def output_before(x):
    y = layers.Conv2D(4, 3, name="conv")(x)
    return [layers.ReLU()(OURS(name="bn")(y)), y]


def shared_layer(x):
    conv = layers.Conv2D(4, 3, padding="same", name="conv")
    return layers.ReLU()(OURS(name="bn")(conv(layers.ReLU()(conv(x)))))


def shared_norm(x):
    bn = OURS(name="bn")
    y = layers.ReLU()(bn(layers.Conv2D(4, 3)(x)))
    return layers.ReLU()(bn(layers.Conv2D(4, 3)(y)))


def padded(x):
    y = OURS(name="bn")(layers.ReLU(name="relu")(x))
    return layers.Conv2D(4, 3, padding="same", name="conv")(y)


def transposed(x):
    y = OURS(name="bn")(layers.ReLU(name="relu")(x))
    return layers.Conv2DTranspose(4, 3, name="conv")(y)


def two_after(x):
    y = OURS(name="bn")(x)
    return layers.Conv2D(4, 3, name="a")(y), layers.Conv2D(4, 3, name="b")(y)


def lora(x):
    dense = layers.Dense(4, name="dense")
    y = dense(x)
    dense.enable_lora(2)
    return OURS(name="bn")(y)


class Doubling(layers.Dense):
    def call(self, x):
        return 2 * super().call(x)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (second_consumer, "'sum' also uses the output of 'conv'"),
        (output_before, "'conv' before it is an output of the model"),
        (shared_layer, "'conv' is shared: it is called in 2 places"),
        (shared_norm, "it is shared: it is called in 2 places"),
        (padded, "'relu' before it is not linear; 'conv' pads with zeros; after"),
        (transposed, "'conv' sums over fewer inputs at its borders"),
        (two_after, "it takes an input of the model; 'a' and 'b' use its output"),
        (
            lambda x: OURS(name="bn")(layers.Dense(4, "tanh", name="c")(x)),
            "'c' before it has the activation tanh; it is an output of the model",
        ),
        (
            lambda x: OURS(name="bn")(layers.Dense(4, name="d")(x), training=True),
            "it is called with `training`",
        ),
        (
            lambda x: OURS(name="bn", dtype="float64")(layers.Dense(4, name="d")(x)),
            "'d' before it computes in float32, not in float64",
        ),
        (
            lambda x: OURS(name="bn")(Doubling(4, name="d")(x)),
            "'d' before it is of type Doubling, which `fold`",
        ),
        (
            lambda x: OURS(axis=1, name="bn")(layers.Dense(4, name="d")(x)),
            "'d' has no w",
        ),
        (
            lambda x: OURS(axis=[1, 3], name="bn")(layers.Dense(4, name="d")(x)),
            "'d' has no weights along several axes at once",
        ),
        (lora, "'dense' before it is quantized or has LoRA weights"),
    ],
)
def test_refusals_name_the_layers(build, reason):
    model = functional(build)
    folded = keras_bn.fold(model)
    (plan,) = keras_bn.plan_fold(model)
    assert plan.into is None
    assert reason in plan.reason
    assert str(plan) == f"bn stays: {plan.reason}"
    x = inputs_of(model)
    assert relative_error(model(x), folded(x)) < 1e-5


def test_quantized_layers_are_refused():
    model = chain((32,), layers.Dense(16, name="dense"), OURS())
    model.layers[0].quantize("int8")
    (plan,) = keras_bn.plan_fold(model)
    assert "'dense' before it is quantized" in plan.reason


def test_lost_statistics_are_refused():
    model = chain(VECTOR, layers.Dense(4), OURS())
    model.layers[1].moving_variance.assign([1.0, -1.0, np.nan, 1.0])
    (plan,) = keras_bn.plan_fold(model)
    assert "not finite" in plan.reason


def test_a_zero_shift_passes_padding():
    model = functional(padded)
    norm = model.get_layer("bn")
    norm.beta.assign(keras.ops.zeros(4))
    norm.moving_mean.assign(keras.ops.zeros(4))
    check(model)


def image_model():
    x = image = keras.Input((12, 12, 3))
    for filters in 4, 8:
        x = layers.Conv2D(filters, 3, use_bias=False)(x)
        x = layers.ReLU()(OURS()(x))
        x = layers.ReLU()(OURS()(layers.DepthwiseConv2D(3)(x)))
    return randomized(keras.Model(image, layers.GlobalAveragePooling2D()(x)))


def test_tflite_contains_no_trace_of_it(tmp_path):
    def sizes(model):
        model.export(tmp_path / "saved", verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
        return converter.convert()

    model = image_model()
    interpreter = tf.lite.Interpreter(model_content=sizes(keras_bn.fold(model)))
    names = {op["op_name"] for op in interpreter._get_ops_details()} - {"DELEGATE"}
    assert names == {"CONV_2D", "DEPTHWISE_CONV_2D", "MEAN"}
    x = inputs_of(model, 1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert relative_error(model(x), y) < 1e-4


def test_onnx_contains_no_trace_of_it():
    tf2onnx = require("tf2onnx")
    runtime = require("onnxruntime")
    model = image_model()
    folded = keras_bn.fold(model)
    function = tf.function(lambda x: folded(x, training=False))
    spec = [tf.TensorSpec((None, 12, 12, 3), tf.float32, name="x")]
    onnx_model, _ = tf2onnx.convert.from_function(function, spec)
    kinds = {node.op_type for node in onnx_model.graph.node}
    assert "Conv" in kinds
    assert not kinds & {"BatchNormalization", "Mul", "Sub", "Add", "Reciprocal", "Sqrt"}
    x = inputs_of(model)
    session = runtime.InferenceSession(onnx_model.SerializeToString())
    (y,) = session.run(None, {"x": x})
    assert relative_error(model(x), y) < 1e-4


def test_bad_arguments():
    with pytest.raises(TypeError, match="Expected a Keras layer or model"):
        keras_bn.fold("model.keras")
    with pytest.raises(ValueError, match="'chain' is not built"):
        keras_bn.fold(keras.Sequential([layers.Dense(3), OURS()], name="chain"))


class Spare(layers.Layer):
    """A layer that makes a normalization and does not call it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dense, self.spare = layers.Dense(3), layers.BatchNormalization(name="bn")

    def build(self, shape):
        self.dense.build(shape)
        self.spare.build((None, 3))

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("kind", ["attribute", "list", "layer", "subclassed"])
def test_what_nothing_calls_stays_for_that_reason(kind):
    norm = layers.BatchNormalization(name="bn")
    norm.build((None, 3))
    inputs = keras.Input((4,))
    if kind == "subclassed":

        class Net(keras.Model):
            def __init__(self):
                super().__init__()
                self.block = Spare()

            def call(self, x):
                return self.block(x)

        model = Net()
        model(np.ones((2, 4)))
    elif kind == "layer":
        model = keras.Model(inputs, Spare()(inputs))
    else:
        model = keras.Model(inputs, layers.Dense(3)(inputs))
        model.spare = [norm] if kind == "list" else norm
        if all(layer is not norm for layer in model._flatten_layers()):
            pytest.skip("on Keras 3.10 a graph does not hold what it does not call")
    (fold,) = keras_bn.plan_fold(model)
    assert fold.into is None
    assert fold.reason == "the model holds it, and does not call it"


def test_what_a_layer_of_keras_calls_stays_for_another():
    inputs = keras.Input((5, 4))
    inner = layers.TimeDistributed(layers.BatchNormalization())
    (fold,) = keras_bn.plan_fold(keras.Model(inputs, inner(inputs)))
    assert "attribute of a layer" in fold.reason
