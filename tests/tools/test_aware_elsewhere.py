"""Training for int8 on every backend: the same rounding, weights, refusals and file."""

import functools
import importlib.util

import keras
import numpy as np
import pytest
from keras import layers, ops
from support import aware_side, backend
from support.alone import run_alone
from support.marks import takes_fake_quantization

import keras_bn
from keras_bn.int8.export import integer_file
from keras_bn.int8.listed import FUNCTIONS, LAYERS, check_listed
from keras_bn.surgery.view import ModelView

pytestmark = [pytest.mark.usefixtures("seeded"), takes_fake_quantization]
ON_TENSORFLOW = backend.NAME == "tensorflow"


def rounded(x, low, high, least=0):
    """The nearest of the values that a range has, and where x is within these."""
    low, high = np.float32(low), np.float32(high)
    scale = (high - low) / np.float32(255 - least)
    zero = np.rint(least - low / scale)
    first, last = (least - zero) * scale, (255 - zero) * scale
    value = np.rint(np.clip(x, first, last) / scale) * scale
    return value, (x >= first) & (x <= last)


@pytest.mark.parametrize("whole", [True, False])
def test_values_and_gradients_of_the_rounding(whole):
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(size=(2, 40, 5)).astype("float32")
    low, high, options = -0.7, 1.6, {}
    if not whole:
        high = np.abs(x).max(0) * np.float32([0.3, 0.7, 0.99, 1.2, 1.9])
        low, options = -high, {"narrow_range": True, "axis": -1}
    bounds = [backend.tensor(np.float32(bound)) for bound in (low, high)]
    y, (gradient,) = backend.vjp(
        lambda x: keras.quantizers.fake_quant_with_min_max_vars(x, *bounds, **options),
        [backend.tensor(x)],
        backend.tensor(upstream),
    )
    expected, inside = rounded(x, low, high, 0 if whole else 1)
    np.testing.assert_allclose(backend.array(y), expected, atol=1e-6)
    np.testing.assert_array_equal(backend.array(gradient), upstream * inside)


def test_a_model_trains_is_saved_and_loaded(tmp_path):
    aware, (x, _) = aware_side.trained(), aware_side.data()
    aware.save(tmp_path / "aware.keras")
    loaded = keras_bn.load_model(tmp_path / "aware.keras")
    expected = aware.predict(x, verbose=0)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    if not ON_TENSORFLOW:
        with pytest.raises(RuntimeError, match="needs Keras's TensorFlow backend"):
            keras_bn.export_int8(aware, tmp_path / "model.tflite")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["torch", "jax"])
def test_the_weights_and_the_file_are_those_of_tensorflow(other, tmp_path):
    backend.tensorflow("it writes files of what other processes trained")
    if importlib.util.find_spec(other) is None:
        pytest.skip(f"needs {other}, which is not installed")
    run_alone("aware_side.py", tmp_path, without="tensorflow", KERAS_BACKEND=other)
    trained = np.load(tmp_path / "weights.npz")
    aware, (x, _) = aware_side.trained(), aware_side.data()
    assert {v.path for v in aware.variables} == set(trained)
    for variable in aware.variables:
        found = trained[variable.path]
        np.testing.assert_allclose(found, variable, atol=1e-5, err_msg=variable.path)
    loaded = keras_bn.load_model(tmp_path / "model.keras")
    errors = [integer_file(model, x[:64])[1].error for model in (loaded, aware)]
    assert errors[0] <= 1.1 * errors[1]


def single(make, shape=(6,), positive=False):
    """A model of one layer, or of a function of tensors."""
    image = keras.Input(shape)
    x = layers.Dense(4)(image)
    return keras.Model(image, make(ops.abs(x) + 1.0 if positive else x))


LINE, IMAGE, VOLUME = (8, 4), (8, 8, 4), (5, 5, 5, 2)


def both(layer):
    return lambda x: layer([x, layers.Dense(4)(x)])


# A model of each layer: the shape of its input, and what gives the layer.
CASES = {
    "AdditiveAttention": (LINE, lambda: both(layers.AdditiveAttention())),
    "Attention": (LINE, lambda: both(layers.Attention())),
    "Average": (LINE, lambda: both(layers.Average())),
    "AveragePooling3D": (VOLUME, lambda: layers.AveragePooling3D(2)),
    "Bidirectional": (LINE, lambda: layers.Bidirectional(layers.LSTM(3))),
    "Conv3D": (VOLUME, lambda: layers.Conv3D(3, 3)),
    "Conv3DTranspose": (VOLUME, lambda: layers.Conv3DTranspose(3, 3)),
    "ConvLSTM1D": ((4, *LINE), lambda: layers.ConvLSTM1D(3, 3)),
    "ConvLSTM2D": ((3, *IMAGE), lambda: layers.ConvLSTM2D(3, 3)),
    "ConvLSTM3D": ((3, *VOLUME), lambda: layers.ConvLSTM3D(3, 3)),
    "Discretization": ((6,), lambda: layers.Discretization([0.0, 1.0])),
    "ELU": ((6,), lambda: layers.ELU()),
    "Embedding": ((6,), lambda: lambda x: layers.Embedding(9, 3)(ops.abs(x))),
    "GRU": (LINE, lambda: layers.GRU(3)),
    "GroupNormalization": (IMAGE, lambda: layers.GroupNormalization(2)),
    "LSTM": (LINE, lambda: layers.LSTM(3)),
    "LayerNormalization": (IMAGE, lambda: layers.LayerNormalization()),
    "Masking": (LINE, lambda: layers.Masking()),
    "MaxPooling3D": (VOLUME, lambda: layers.MaxPooling3D()),
    "MultiHeadAttention": (
        LINE,
        lambda: lambda x: layers.MultiHeadAttention(2, 3)(x, x),
    ),
    "Normalization": (IMAGE, lambda: layers.Normalization(mean=0.1, variance=2.0)),
    "RMSNormalization": (IMAGE, lambda: layers.RMSNormalization()),
    "Rescaling": (IMAGE, lambda: layers.Rescaling(0.5, 0.1)),
    "SimpleRNN": (LINE, lambda: layers.SimpleRNN(3)),
    "UnitNormalization": (IMAGE, lambda: layers.UnitNormalization()),
    # These the converter takes.
    "Concatenate": (LINE, lambda: both(layers.Concatenate())),
    "EinsumDense": (LINE, lambda: layers.EinsumDense("abc,cd->abd", (None, 3))),
    "LeakyReLU": ((6,), lambda: layers.LeakyReLU()),
    "Maximum": (LINE, lambda: both(layers.Maximum())),
    "Multiply": (LINE, lambda: both(layers.Multiply())),
    "PReLU": (IMAGE, lambda: layers.PReLU(shared_axes=[1, 2])),
    "Resizing": (IMAGE, lambda: layers.Resizing(4, 4)),
    "Softmax": ((6,), lambda: layers.Softmax()),
    "Subtract": (LINE, lambda: both(layers.Subtract())),
    "TimeDistributed": (LINE, lambda: layers.TimeDistributed(layers.Dense(3))),
    "UpSampling3D": (VOLUME, lambda: layers.UpSampling3D()),
}
ALONG = {"argmax", "cumsum", "logsumexp", "sort", "std", "var", "max", "mean", "min"}
# Functions that the converter takes.
TAKEN = ["clip", "exp", "exponential", "gelu", "hard_silu", "hard_tanh", "leaky_relu"]
TAKEN += ["log", "log_softmax", "max", "mean", "min", "relu", "relu6", "rsqrt"]
TAKEN += ["sigmoid", "silu", "soft_shrink", "softmax", "sqrt", "tanh", "tanh_shrink"]


def function(name):
    """A layer with an activation, or a function of `keras.ops`."""
    if hasattr(keras.activations, name):
        return layers.Activation(name)
    found = getattr(ops, name)
    options = {"axis": 1} if name in ALONG else {}
    options |= {"x_min": -1.0, "x_max": 1.0} if name == "clip" else {}
    if name == "logaddexp":
        return lambda x: found(x, layers.Dense(4)(x))
    return functools.partial(found, **options)


def model_of(name):
    if name in CASES:
        shape, make = CASES[name]
        return single(make(), shape)
    positive = name in ("log", "sqrt", "rsqrt", "log1p")
    return single(function(name), LINE, positive)


EVERY = [*CASES, *sorted(FUNCTIONS), *TAKEN]


def refusal(check):
    """Whether a check refuses a model since it cannot be made integer."""
    try:
        check()
    except ValueError as error:
        return "integer" in str(error) or "TFLite" in str(error)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_the_list_says_what_the_converter_does(name):
    backend.tensorflow("its converter is asked")
    model = model_of(name)
    x = np.random.default_rng(0).normal(size=(4, *model.input_shape[1:]))
    asked = refusal(lambda: keras_bn.quantize_aware(model, x.astype("float32")))
    assert asked == (name in LAYERS | FUNCTIONS)


def test_the_list_knows_each_of_its_layers_and_functions():
    assert set(CASES) > LAYERS
    for name in EVERY:
        refused = refusal(lambda name=name: check_listed(ModelView(model_of(name))))
        assert refused == (name in LAYERS | FUNCTIONS), name


@pytest.mark.skipif(ON_TENSORFLOW, reason="there the converter is asked")
def test_what_cannot_be_exported_is_refused_by_name():
    stack = [layers.Dense(4, activation="elu", name="dense"), layers.LSTM(3, name="r")]
    model = keras.Sequential([keras.Input(LINE), *stack])
    x = np.zeros((4, *LINE), "float32")
    message = r"activation of 'dense', 'r' of .* no integers for LSTM, elu in training"
    with pytest.raises(ValueError, match=message):
        keras_bn.quantize_aware(model, x)
