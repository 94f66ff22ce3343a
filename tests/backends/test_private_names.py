"""The private names of TensorFlow and PyTorch are there, and are not needed."""

import keras
import numpy as np
import pytest
from support import backend

import keras_bn

if backend.NAME == "jax":
    pytest.skip("JAX is used by public names alone", allow_module_level=True)

LEAST = 2**17  # elements from which PyTorch normalizes planes


def model(shape):
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    x = keras.layers.Conv2D(8, 3, padding="same")(inputs)
    x = keras_bn.BatchNormalization(name="first")(x)
    x = keras.layers.Conv2D(8, 3, activation="relu")(x)
    x = keras_bn.BatchNormalization(name="second", renorm=True)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras_bn.BatchNormalization(name="third", virtual_batch_size=4)(x)
    made = keras.Model(inputs, keras.layers.Dense(1)(x))
    made.compile(keras.optimizers.SGD(0.05), "mse")
    return made


def trained(shape, samples):
    """The weights and outputs of a model after three steps, and a second derivative."""
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, (samples, *shape)).astype("float32")
    made = model(shape)
    made.fit(x, x[:, 0, 0, :1], batch_size=8, epochs=1, shuffle=False, verbose=0)
    made.evaluate(x, x[:, 0, 0, :1], verbose=0)
    weights = [keras.ops.convert_to_numpy(w) for w in made.weights]
    return [*weights, made.predict(x, verbose=0), *second_derivative(x[:, 0])]


def second_derivative(x):
    if backend.NAME != "tensorflow":
        return []
    import tensorflow as tf

    layer = keras_bn.BatchNormalization()
    layer.build(x.shape)

    @tf.function(autograph=False)
    def derive(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(tf.sin(layer(x, training=True)))
            first = inner.gradient(y, x)
            total = tf.reduce_sum(first**2)
        return first, outer.gradient(total, [x, *layer.trainable_weights[:1]])[0]

    return [value.numpy() for value in derive(tf.constant(x))]


def without(monkeypatch):
    """Take every private name away, as where a version has none of them."""
    if backend.NAME == "torch":
        from keras_bn.backends.torch import private

        monkeypatch.setattr(private, "batch_norm_backward", None)
        monkeypatch.delattr(private.DistributedDataParallel, "_get_active_ddp_module")
        assert private.active_module() is None
    else:
        from keras_bn.backends.tensorflow import private

        for name in ("record", "_framework_ops", "_control_flow"):
            monkeypatch.setattr(private, name, None)


@pytest.mark.parametrize(
    ("shape", "samples"), [((6, 6, 3), 24), ((24, 24, 3), 40)], ids=["small", "large"]
)
def test_without_them_the_numbers_are_the_same(shape, samples, monkeypatch):
    want = trained(shape, samples)
    without(monkeypatch)
    got = trained(shape, samples)
    for a, b in zip(got, want, strict=True):
        # Biases before a normalization have no gradient but what rounding leaves.
        tolerance = max(2e-4 * np.abs(b).max(), 2e-5)
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=tolerance)


def test_images_with_their_channels_first(monkeypatch):
    if backend.NAME != "torch":
        pytest.skip("planes are a kernel of PyTorch's")
    import torch

    from keras_bn.backends.torch import planes

    x = torch.randn(8, 16, 40, 40, requires_grad=True)
    assert x.numel() >= LEAST
    assert planes.fits(x, torch.ones(16), torch.ones(16))
    layer = keras_bn.BatchNormalization(axis=1)
    upstream = torch.randn(8, 16, 40, 40)

    def results():
        y = layer(x, training=True)
        return y, *torch.autograd.grad(y, x, upstream)

    want = results()
    without(monkeypatch)
    assert not planes.fits(x, torch.ones(16), torch.ones(16))
    for a, b in zip(results(), want, strict=True):
        np.testing.assert_allclose(a.detach(), b.detach(), rtol=1e-4, atol=1e-5)


def test_tensorflow_has_them():
    tf = backend.tensorflow("its names")
    from keras_bn.backends.tensorflow import private

    assert callable(private.record.record_operation)
    assert callable(private.record.stop_recording)
    seen = {}

    @tf.function(autograph=False)
    def asks(x):
        graph = tf.compat.v1.get_default_graph()
        seen[len(seen)] = private.in_xla(graph)
        return x

    asks(1.0)
    tf.function(asks, jit_compile=True, autograph=False)(2.0)
    assert list(seen.values()) == [False, True]
    tf.RegisterGradient("keras_bn-a-test")(lambda op, upstream: upstream)
    assert private._framework_ops.gradient_registry.lookup("keras_bn-a-test")
    private.forget_gradient("keras_bn-a-test")
    with pytest.raises(LookupError):
        private._framework_ops.gradient_registry.lookup("keras_bn-a-test")


def test_the_ranges_in_a_measured_file_can_be_written():
    tf = backend.tensorflow("its converter")
    from keras_bn.backends.tensorflow import private

    double = tf.function(lambda x: 2.0 * x, input_signature=[tf.TensorSpec((1, 2))])
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [double.get_concrete_function()]
    )
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: [[np.ones((1, 2), "float32")]]
    content = bytearray(private.measured(converter))
    scales = []
    for size in (1.0, 10.0):
        for least, most in private.ranges(content).values():
            least[:], most[:] = -size, size
        assert private.converts_in_halves()
        file = private.quantized(bytes(content), tf.int8, [])
        (given,) = tf.lite.Interpreter(model_content=file).get_input_details()
        scales.append(given["quantization"][0])
    np.testing.assert_allclose(scales, [2 / 255, 20 / 255], rtol=1e-5)


def test_a_function_of_tensorflow_is_copied_with_its_options():
    tf = backend.tensorflow("its functions")
    from keras_bn.backends.tensorflow import private

    spec = [tf.TensorSpec([None], "float32")]
    function = tf.function(
        lambda x: x, input_signature=spec, jit_compile=True, autograph=False
    )
    copy = private.copy_function(function, lambda x: x + 1)
    assert copy(tf.zeros(2)).numpy().tolist() == [1.0, 1.0]
    assert copy.input_signature == function.input_signature
    for option in ("_jit_compile", "_autograph", "_reduce_retracing", "_name"):
        assert getattr(copy, option) == getattr(function, option)
