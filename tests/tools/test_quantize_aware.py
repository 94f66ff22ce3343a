"""Training with quantization: what is computed, what trains, what the file says."""

import pickle

import keras
import numpy as np
import pytest
from keras import layers, ops
from support import backend
from support.backend import array
from support.marks import mostly_slow, takes_fake_quantization
from support.rounding import rounded as rounded_kernel
from support.zoo import randomized

import keras_bn
from keras_bn.int8 import tflite
from keras_bn.int8.convert import constant
from keras_bn.int8.export import integer_file
from keras_bn.int8.layers import FakeQuantizedLinear, FakeQuantizer
from keras_bn.surgery.view import ModelView

tf = backend.tensorflow("its ops round")

from test_int8 import KINDS, error, images, small  # noqa: E402

pytestmark = [pytest.mark.usefixtures("seeded"), takes_fake_quantization]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_means_have_a_range_of_their_own(dimensions):
    pool = getattr(layers, f"GlobalAveragePooling{dimensions}D")(name="pool")
    inputs = keras.Input((*[4] * dimensions, 3))
    data = np.random.default_rng(0).normal(size=(8, *inputs.shape[1:]))
    aware = keras_bn.quantize_aware(keras.Model(inputs, pool(inputs)), data)
    assert [layer.name for layer in aware.layers][-2:] == ["pool", "int8_pool"]


def test_an_old_tensorflow_is_refused(monkeypatch):
    monkeypatch.setattr(tf, "__version__", "2.16.2")
    with pytest.raises(
        RuntimeError, match=r"needs TensorFlow 2\.17 .*Received: .*2\.16"
    ):
        keras_bn.quantize_aware(small(), images())


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_a_model_that_keras_quantized_is_refused():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(5, name="dense")]
    )
    model.quantize("int8")
    with pytest.raises(ValueError, match="'dense' is quantized by Keras's"):
        keras_bn.quantize_aware(model, images())


@pytest.fixture(scope="module")
def shared():
    """A model that rounds, its file and report. No test changes it."""
    keras.utils.set_random_seed(0)
    aware = keras_bn.quantize_aware(small(), images(32), batch_size=16)
    return aware, *integer_file(aware)


def called(model, x):
    """What a model gives in inference, without a trace for so few samples."""
    return model(x, training=False).numpy()


def outputs(content, x):
    """The outputs of a file, and the step between two of its values."""
    interpreter = tflite.Interpreter(content)
    (index,) = interpreter.outputs().values()
    found = []
    for each in x:
        interpreter.run(dict.fromkeys(interpreter.inputs(), each[None]))
        found.append(interpreter.value(index)[0])
    return np.array(found), interpreter.tensors[index]["quantization"][0]


def check_file(model, x, same=0.4, most=5):
    """The file computes what the model does, but for roundings, here and there.

    The model rounds what floats give, and the file sums of integers. One differs from
    the other where a value is half way between two; several layers add these up.
    """
    content, report = integer_file(model, x)
    value, step = outputs(content, x)
    off = np.abs(value - called(model, x)) / step
    assert off.max() < most + 0.1
    assert np.mean(off < 0.5) > same
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_computes_what_the_model_does(kind):
    shape, make = KINDS[kind]
    bn = keras_bn.BatchNormalization(axis=1 if kind == "channels first" else -1)
    stack = [keras.Input(shape), *make(), bn, layers.ReLU()]
    model = randomized(keras.Sequential(stack))
    aware = keras_bn.quantize_aware(model, images(16, shape))
    assert not any(isinstance(each, type(bn)) for each in aware.layers)
    exact = kind != "separable"  # which is two operations
    check_file(aware, images(16, shape), *((0.97, 1) if exact else (0.85, 5)))
    expected = called(model, images(16, shape))
    found = error(called(aware, images(16, shape)), expected)
    assert 0.001 < found < 0.04


def test_a_whole_network(shared):
    aware, *_ = shared
    assert [each.name for each in aware.layers] == [
        "image",
        "int8_input",
        "conv",
        "conv_relu",
        "int8_conv_relu",
        "depthwise",
        "depthwise_relu",
        "int8_depthwise_relu",
        "project",
        "int8_project",
        "add",
        "int8_add",
        "inner",
        "pool",
        "int8_pool",
        "head",
        "int8_head",
    ]
    report = check_file(aware, images())
    assert {each.layer for each in report.layers} == {
        "conv",
        "depthwise",
        "project",
        "add",
        "inner/strided",
        "pool",
        "head",
    }
    assert max(each.error for each in report.layers) < 0.02
    names = {v.path for v in small().variables}
    assert names < {v.path for v in aware.variables}


OTHERS = {
    "unfolded": lambda: [
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Conv2D(5, 3),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(3),
    ],
    "activations inside": lambda: [
        layers.Conv2D(5, 3, activation="swish"),
        layers.Conv2D(5, 3, activation="sigmoid"),
        layers.AveragePooling2D(2),
        layers.UpSampling2D(),
        layers.LeakyReLU(),
    ],
    "two normalizations": lambda: [
        layers.Dense(5),
        layers.BatchNormalization(),
        layers.BatchNormalization(),
        layers.ReLU(6.0),
    ],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers(name):
    model = randomized(keras.Sequential([keras.Input((8, 8, 4)), *OTHERS[name]()]))
    x = images(24, (8, 8, 4))
    aware = keras_bn.quantize_aware(model, x)
    check_file(aware, x)
    assert error(called(aware, x), called(model, x)) < 0.04


def test_a_softmax_has_the_range_that_tflite_gives_it():
    stack = [keras.Input((6,)), layers.Dense(3, activation="softmax", name="head")]
    model = keras.Sequential(stack)
    aware = keras_bn.quantize_aware(model, images(24, (6,)))
    assert model.get_layer("head").activation is keras.activations.softmax
    names = [each.name for each in aware.layers]
    assert names[-3:] == ["int8_head", "head_activation", "int8_head_activation"]
    check_file(aware, images(24, (6,)))


def wrapped(**options):
    """A convolution and its normalization, rounded together; and both alone."""
    conv = layers.Conv2D(5, 3, use_bias=options.pop("use_bias", False))
    norm = keras_bn.BatchNormalization(**options)
    layer = FakeQuantizedLinear(conv, norm)
    layer.build((None, 8, 8, 3))
    randomized(keras.Sequential([keras.Input((8, 8, 3)), conv, norm]))
    return layer, conv, norm


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_training_is_the_whitepapers_formula(use_bias, affine):
    layer, conv, norm = wrapped(use_bias=use_bias, scale=affine, center=affine)
    x = images(6)
    gamma = norm.gamma.numpy() if affine else 1.0
    beta = norm.beta.numpy() if affine else 0.0
    mean, variance = norm.moving_mean.numpy(), norm.moving_variance.numpy()
    sigma = np.sqrt(variance + norm.epsilon)
    plain = conv(x).numpy()
    batch_sigma = np.sqrt(plain.var((0, 1, 2)) + norm.epsilon)
    folded = conv.kernel.numpy() * gamma / sigma
    rounded = rounded_kernel(folded)
    whole = ops.conv(x, rounded.astype("float32")).numpy()
    # Section 3.2.2: the correction c is the batch's deviation over the moving one.
    bias = conv.bias.numpy() if use_bias else 0.0
    without = plain.mean((0, 1, 2)) - bias
    expected = whole * sigma / batch_sigma + beta - gamma * without / batch_sigma
    np.testing.assert_allclose(array(layer(x, training=True)), expected, atol=2e-5)
    after = norm.momentum * mean + (1 - norm.momentum) * plain.mean((0, 1, 2))
    np.testing.assert_allclose(norm.moving_mean, after, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_inference_and_frozen_training_use_the_weights_of_the_file(frozen):
    layer, conv, norm = wrapped(use_bias=True)
    norm.freeze_statistics = frozen
    scale = norm.gamma / ops.sqrt(norm.moving_variance + norm.epsilon)
    rounded = rounded_kernel((conv.kernel * scale).numpy())
    offset = (conv.bias - norm.moving_mean) * scale + norm.beta
    expected = ops.conv(images(6), rounded.astype("float32")) + offset
    before = norm.moving_mean.numpy()
    value = layer(images(6), training=frozen)
    np.testing.assert_allclose(value, expected, atol=2e-5)
    np.testing.assert_array_equal(norm.moving_mean, before)
    found, bias = layer.weights_of_inference()
    np.testing.assert_allclose(found["kernel"], rounded, atol=1e-6)
    np.testing.assert_allclose(bias, offset, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_go_straight_through(training):
    """They are nearly those of the layers unrounded; none is cut off."""
    layer, conv, norm = wrapped()
    x = tf.constant(images(6))
    upstream = np.random.default_rng(2).normal(size=(6, 6, 6, 5)).astype("float32")

    def gradients(function):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.reduce_sum(function() * upstream)
        return tape.gradient(value, [x, *(v.value for v in layer.trainable_variables)])

    found = gradients(lambda: layer(x, training=training))
    expected = gradients(lambda: norm(conv(x), training=training))
    for one, other in zip(found, expected, strict=True):
        spread = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=0.02 * spread)
    assert len(found) == 4


def test_quantizers_follow_their_input():
    layer = FakeQuantizer(momentum=0.5)
    layer.build((None, 3))
    layer.low.assign(-1.0)
    layer.high.assign(1.0)
    x = np.array([[3.0, -0.5, 0.2]], "float32")
    y = layer(x, training=True).numpy()
    # As fake quantization has it, 0 is one of the values: the range moves a little.
    assert (float(layer.low), float(layer.high)) == (-0.75, 2.0)
    assert y[0, 0] == pytest.approx(2.0, abs=0.01)
    assert np.abs(y - np.clip(x, -0.75, 2.0)).max() < 2.75 / 255
    layer(x, training=False)
    layer.trainable = False
    layer(x, training=True)
    assert (float(layer.low), float(layer.high)) == (-0.75, 2.0)
    layer.trainable = True
    layer(x * np.nan, training=True)
    layer(np.zeros((0, 3), "float32"), training=True)
    assert (float(layer.low), float(layer.high)) == (-0.75, 2.0)


def test_the_first_ranges_are_those_of_the_data(shared):
    (aware, *_), x = shared, images(32)
    quantizer = ModelView(aware).of_type(FakeQuantizer)["int8_input"]
    expected = np.mean([x[:16].max(), x[16:].max()])
    assert float(quantizer.high) == pytest.approx(expected, rel=1e-6)
    assert float(ModelView(aware).of_type(FakeQuantizer)["int8_conv_relu"].low) == 0.0


def compiled():
    model = small(bn=layers.BatchNormalization)
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    model.fit(images(), np.zeros((24, 5)), verbose=0)
    return model


def test_training_goes_on_with_the_optimizer_and_the_original_stays():
    model = compiled()
    before = [v.numpy() for v in model.variables]
    slots = [v.numpy() for v in model.optimizer.variables]
    aware = keras_bn.quantize_aware(model, images())
    assert aware.optimizer.iterations == 1
    carried = [v.numpy() for v in aware.optimizer.variables]
    for one, other in zip(slots, carried, strict=True):
        np.testing.assert_array_equal(one, other)
    low = float(ModelView(aware).of_type(FakeQuantizer)["int8_head"].low)
    first = aware.evaluate(images(), np.zeros((24, 5)), verbose=0)
    aware.fit(images(), np.zeros((24, 5)), epochs=15, verbose=0)
    assert aware.evaluate(images(), np.zeros((24, 5)), verbose=0) < 0.9 * first
    assert float(ModelView(aware).of_type(FakeQuantizer)["int8_head"].low) != low
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    check_file(aware, images())


def test_a_file_saved_in_between(shared, tmp_path):
    stack = [keras.Input((8, 8, 3)), layers.SeparableConv2D(4, 3, activation="tanh")]
    other = keras_bn.quantize_aware(keras.Sequential(stack), images())
    for aware in shared[0], other:
        aware.save(tmp_path / "aware.keras")
        loaded = keras.saving.load_model(tmp_path / "aware.keras")
        np.testing.assert_array_equal(array(loaded(images())), aware(images()))
        assert [layer.name for layer in loaded.layers] == [
            layer.name for layer in aware.layers
        ]
        values = [
            outputs(integer_file(each)[0], images())[0] for each in (loaded, aware)
        ]
        np.testing.assert_array_equal(*values)


def test_a_report_without_data_draws_samples(shared):
    *_, report = shared
    assert report.drawn
    assert report.samples == 64
    assert "drawn at random" in str(report)
    assert report.error < 0.02


def test_frozen_training_is_inference_with_gradients(shared):
    aware = keras_bn.from_keras(shared[0])
    assert len(keras_bn.freeze(aware)) == 3
    ranges = list(ModelView(aware).of_type(FakeQuantizer).values())
    for quantizer in ranges:
        quantizer.trainable = False
    np.testing.assert_allclose(
        aware(images(), training=True), aware(images()), atol=1e-5
    )


def test_under_xla_and_eagerly():
    norm = keras_bn.BatchNormalization()
    pool = layers.GlobalAveragePooling2D()
    model = keras_bn.quantize_aware(chain(norm, layers.ReLU(), pool), images())
    losses = []
    for options in {"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}:
        aware = keras_bn.from_keras(model)
        aware.compile("sgd", "mse", **options)
        history = aware.fit(
            images(), np.zeros((24, 4)), batch_size=24, epochs=2, verbose=0
        )
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.01)
    np.testing.assert_allclose(losses[2], losses[1], rtol=0.01)


def renorm():
    return keras_bn.BatchNormalization(renorm=True, name="norm")


def unknown():
    """A model whose optimizer has seen a part of its weights."""
    model = small()
    model.get_layer("head").trainable = False
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.get_layer("head").trainable = True
    return model


def chain(*stack, shape=(8, 8, 3)):
    return keras.Sequential([keras.Input(shape), layers.Conv2D(4, 3), *stack])


REFUSED = {
    "optimizer": (unknown, "optimizer.*has no state for head/kernel"),
    "elu": (lambda: chain(layers.ELU(name="last")), "'last'"),
    "inside": (
        lambda: chain(layers.Dense(2, activation="elu", name="d")),
        "activation of 'd'",
    ),
    "renorm": (lambda: chain(renorm()), "'norm' has renorm"),
    "axis": (
        lambda: chain(layers.ReLU(), layers.BatchNormalization(1, name="norm")),
        "'norm'.*last axis",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        keras_bn.quantize_aware(make(), images())


def test_refused_arguments():
    model = small()
    with pytest.raises(ValueError, match="not one batch"):
        keras_bn.quantize_aware(model, iter(()), steps=2)
    with pytest.raises(ValueError, match=r"values at .* are not finite"):
        keras_bn.quantize_aware(model, images() * np.nan)


def test_a_model_that_rounds_already_is_refused(shared):
    aware, *_ = shared
    with pytest.raises(ValueError, match="not from `keras_bn"):
        integer_file(aware, equalize=True)
    with pytest.raises(ValueError, match=r"already.*export_int8"):
        keras_bn.quantize_aware(aware, images())


def test_an_optimizer_that_does_not_carry_over_can_be_left_behind():
    aware = keras_bn.quantize_aware(unknown(), images(), compiled=False)
    assert not aware.compiled


def test_diagnosis_and_recalibration_find_the_normalizations(shared):
    aware = keras_bn.from_keras(shared[0])
    found = keras_bn.recalibrate(aware, images(), verbose=0)
    assert set(found) == {
        "conv/conv_bn",
        "depthwise/depthwise_bn",
        "project/project_bn",
    }
    assert keras_bn.diagnose(aware, images(240)).record.not_called == ()


def test_a_fused_model_rounds_and_is_exported_as_an_unfused_one():
    frozen = chain(keras_bn.BatchNormalization(), layers.ReLU(), shape=(6, 6, 3))
    fused = keras_bn.from_keras(randomized(frozen))
    keras_bn.freeze(frozen)
    assert keras_bn.freeze(fused, fuse=True)[0].into is not None
    x = images(24, (6, 6, 3))
    files, trained = [], []
    for model in frozen, fused:
        files.append(outputs(integer_file(model, x)[0], x)[0])
        aware = keras_bn.quantize_aware(model, x)
        assert not any("call" in vars(la) for la in aware._flatten_layers())
        aware.compile("sgd", "mse")
        aware.fit(x, np.zeros((24, 4, 4, 4)), verbose=0)
        trained.append([v.numpy() for v in aware.weights])
    np.testing.assert_array_equal(*files)
    for a, b in zip(*trained, strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)


@pytest.mark.slow
def test_copies_of_a_model_that_rounds(shared, tmp_path):
    """They round as it does, and make the same file."""
    aware, content, _ = shared
    expected, (of_file, _) = called(aware, images()), outputs(content, images())
    cloned = keras.models.clone_model(aware)
    cloned.set_weights(aware.get_weights())
    by_weights = keras.models.clone_model(aware)
    aware.save_weights(tmp_path / "aware.weights.h5")
    by_weights.load_weights(tmp_path / "aware.weights.h5")
    copies = {
        "fold": keras_bn.fold(aware),
        "from_keras": keras_bn.from_keras(aware),
        "clone_model": cloned,
        "weights": by_weights,
        "pickle": pickle.loads(pickle.dumps(aware)),
    }
    for name, copy in copies.items():
        np.testing.assert_array_equal(called(copy, images()), expected, err_msg=name)
        assert not {*map(id, copy.variables)} & {*map(id, aware.variables)}
        if name in ("fold", "clone_model"):  # live objects copied, and a config
            found, _ = outputs(integer_file(copy)[0], images())
            np.testing.assert_array_equal(found, of_file, err_msg=name)


def test_tools_on_a_model_that_rounds(shared):
    aware = keras_bn.from_keras(shared[0])
    expected = called(aware, images())
    assert keras_bn.from_keras(aware, in_place=True) is aware
    report = integer_file(aware, images())[1]
    assert (report.drawn, report.samples) == (False, len(images()))
    for in_place in True, False:
        with pytest.raises(ValueError, match=r"quantize_aware.*export_int8"):
            keras_bn.to_keras(aware, in_place=in_place)
    folds = keras_bn.plan_fold(aware)
    assert [each.into for each in folds] == [None] * 3
    assert all("folded already" in each.reason for each in folds)
    assert list(keras_bn.freeze(aware, fuse=True)) == list(folds)
    assert len(keras_bn.unfreeze(aware)) == 3
    np.testing.assert_array_equal(called(aware, images()), expected)


def test_keras_has_no_rounding_of_activations_either():
    model = keras.Sequential([keras.Input((6,)), layers.ReLU(name="relu")])
    aware = keras_bn.quantize_aware(model, images(24, (6,)))
    with pytest.raises(ValueError, match=r"'int8_input' was made by.*no such layer"):
        keras_bn.to_keras(aware)


ONE_CHANNEL = {
    "conv1d": ((9, 3), lambda: layers.Conv1D(1, 1)),
    "causal": ((9, 3), lambda: layers.Conv1D(1, 3, padding="causal")),
    "relu": ((9, 3), lambda: layers.Conv1D(1, 3, activation="relu")),
    "transposed": ((9, 3), lambda: layers.Conv1DTranspose(1, 3)),
    "depthwise": ((9, 1), lambda: layers.DepthwiseConv1D(3)),
    "separable": ((9, 3), lambda: layers.SeparableConv1D(1, 3)),
    "dense": ((9, 3), lambda: layers.Dense(1)),
    "conv2d": ((8, 8, 3), lambda: layers.Conv2D(1, 3)),
}


@pytest.mark.parametrize("name", mostly_slow(ONE_CHANNEL, ["conv1d", "separable"]))
def test_one_channel_with_a_trained_bias_is_exported(name, tmp_path):
    shape, make = ONE_CHANNEL[name]
    model = keras.Sequential([keras.Input(shape), make()])
    x = images(24, shape)
    aware = keras_bn.quantize_aware(model, x)
    aware.compile(keras.optimizers.SGD(0.01), "mse")
    aware.fit(x, aware.predict(x, verbose=0) + 0.5, verbose=0)
    assert aware.trainable_variables[-1].numpy().any()
    report = keras_bn.export_int8(aware, tmp_path / "model.tflite", x)
    assert report.error < 0.01


def test_no_weights_are_zero_while_it_is_checked_that_a_file_can_be_made():
    """The converter leaves zeros out, which training changes."""
    layer = FakeQuantizedLinear(layers.Dense(3, kernel_initializer="zeros"))
    view = ModelView(keras.Sequential([keras.Input((2,)), layer]))
    for trained in False, True:
        with constant(view, trained):
            kernels, bias = layer.baked
            assert kernels["kernel"].any() == bias.any() == trained
    assert layer.baked is None


@pytest.mark.parametrize("activation", ["hard_sigmoid", "softplus", "selu", "mish"])
def test_a_refused_activation_is_named_and_where_it_is_taken(activation, tmp_path):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4, activation=activation, name="dense")]
    )
    x = images(24, (6,))
    with pytest.raises(
        ValueError,
        match=r"cannot make the activation of 'dense' of .* in floats.* "
        "`keras_bn.export_int8` of a model that is not .* takes more activations",
    ):
        keras_bn.quantize_aware(model, x)
    assert keras_bn.export_int8(model, tmp_path / "model.tflite", x).error < 0.2


def test_export_does_not_point_to_itself(tmp_path):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, activation="elu")])
    with pytest.raises(ValueError, match=r"exported\. Or name it in `keep_float`\.$"):
        keras_bn.export_int8(model, tmp_path / "model.tflite", images(24, (6,)))


def test_values_that_are_not_finite_are_named_as_in_the_model():
    x = images(24, (6,)).copy()
    stack = [layers.Dense(4, name="dense"), layers.Lambda(ops.log, name="log")]
    model = keras.Sequential([keras.Input((6,)), *stack])
    with pytest.raises(ValueError, match="The values at 'log' are not finite"):
        keras_bn.quantize_aware(model, x)


def test_a_pass_over_data_leaves_out_what_is_masked():
    x = np.random.default_rng(0).normal(3.0, 2.0, (40, 5, 2)).astype("float32")
    x[:, 3:] = 0.0
    dense = layers.Dense(3)
    means = []
    for parts in (
        [dense, keras_bn.BatchNormalization(name="bn")],
        [FakeQuantizedLinear(dense, keras_bn.BatchNormalization(name="bn"))],
    ):
        model = keras.Sequential([keras.Input((5, 2)), layers.Masking(), *parts])
        (found,) = keras_bn.recalibrate(model, x, verbose=0).values()
        assert (found.count == 120).all()
        means.append(found.mean)
    np.testing.assert_allclose(*means, rtol=1e-5)
