"""Inputs that are no plain tensors: variables, and TensorFlow's ragged tensors."""

import keras
import numpy as np
import oracle
import pytest
from support import backend
from support.backend import tf
from support.steps import array

import keras_bn

ragged_only = backend.only("tensorflow", "ragged tensors")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
@pytest.mark.parametrize("shape", [(6, 2), (3, 4, 2), (2, 3, 3, 2)])
def test_a_variable_is_an_input(shape, dtype, training):
    """An image that is optimized, or a layer's own kernel."""
    x = np.random.default_rng(0).normal(3, 2, shape)
    of_layer = "float64" if dtype == "float64" else "float32"
    variable = keras.Variable(x, dtype=of_layer)
    layers = [keras_bn.BatchNormalization(dtype=dtype) for _ in range(2)]
    got = layers[0](variable, training=training)
    want = layers[1](backend.tensor(x, of_layer), training=training)
    np.testing.assert_array_equal(array(got), array(want))
    np.testing.assert_array_equal(
        array(layers[0].moving_mean), array(layers[1].moving_mean)
    )


def test_a_gradient_reaches_the_variable():
    x = np.random.default_rng(0).normal(3, 2, (6, 2)).astype("float32")
    upstream = np.random.default_rng(1).normal(size=(6, 2)).astype("float32")
    variable = keras.Variable(x)
    layer = keras_bn.BatchNormalization()
    layer.build((None, 2))
    step = backend.training_step(
        lambda _: layer(variable, training=True), [variable, *layer.variables], "eager"
    )
    zero = backend.tensor(np.zeros(1, "float32"))
    _, gradients = step(zero, backend.tensor(upstream))
    want = oracle.backward(x, np.ones(2), (1,), 1e-3, upstream)[0]
    np.testing.assert_allclose(array(gradients[1]), want, atol=1e-5)


def ragged(*lengths, inner=(2,), dtype="float32", seed=0):
    """Rows of these lengths, each element of an inner shape; the values beside it."""
    values = np.random.default_rng(seed).normal(3, 2, (sum(lengths), *inner))
    values = values.astype(dtype)
    return tf.RaggedTensor.from_row_lengths(values, lengths), values


@ragged_only
def test_a_ragged_tensor_is_what_keras_makes_of_it():
    x = tf.ragged.constant([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]], ragged_rank=1)
    outputs = []
    for cls in (keras.layers.BatchNormalization, keras_bn.BatchNormalization):
        layer = cls(momentum=0.0)
        outputs.append([layer(x, training=True), layer(x)])
        np.testing.assert_allclose(array(layer.moving_mean), [3, 4], rtol=1e-6)
        np.testing.assert_allclose(array(layer.moving_variance), 8 / 3, rtol=1e-6)
    for want, got in zip(*outputs, strict=True):
        assert got.shape.as_list() == want.shape.as_list()
        np.testing.assert_array_equal(got.row_splits, want.row_splits)
        np.testing.assert_allclose(got.flat_values, want.flat_values, atol=1e-5)


@ragged_only
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("inner", [(2,), (3, 2)])
@pytest.mark.parametrize("lengths", [(3, 0, 5), (1, 1), (400, 7, 200)])
def test_a_ragged_step_is_that_of_its_values(lengths, inner, mode):
    x, values = ragged(*lengths, inner=inner)
    upstream = np.random.default_rng(1).normal(size=values.shape)
    layer = keras_bn.BatchNormalization(momentum=0.0)
    layer.build(x.shape)

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x.flat_values)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y.flat_values * upstream.astype("float32"))
        return y, tape.gradient(loss, [x.flat_values, layer.gamma.value])

    y, (dx, d_gamma) = (run if mode == "eager" else tf.function(run))(x)
    axes, ones = (len(inner),), np.ones(2)
    want = oracle.forward(values, ones, np.zeros(2), axes, 1e-3)
    want_dx, want_gamma, _ = oracle.backward(values, ones, axes, 1e-3, upstream)
    assert y.shape.rank == x.shape.rank
    np.testing.assert_array_equal(y.row_lengths(), lengths)
    np.testing.assert_allclose(y.flat_values, want, atol=1e-5)
    np.testing.assert_allclose(dx, want_dx, atol=1e-5)
    np.testing.assert_allclose(d_gamma, want_gamma, rtol=1e-4, atol=1e-3)
    mean = oracle.moments(values, axes)[1]
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-5)


@ragged_only
def test_two_ragged_axes_a_mask_and_other_dtypes():
    x = tf.ragged.constant(
        [[[[1, 2]], [[3, 4], [5, 6]]], [[[9, 8]]]], ragged_rank=2, dtype="int32"
    )
    mask = tf.ragged.constant([[[True], [True, False]], [[True]]])
    layer = keras_bn.BatchNormalization(momentum=0.0)
    y = layer(x, training=True, mask=mask)
    assert y.dtype == "float32"
    assert y.shape.as_list() == [2, None, None, 2]
    np.testing.assert_allclose(array(layer.moving_mean), [13 / 3, 14 / 3], rtol=1e-6)


@ragged_only
def test_ragged_models_fit_predict_and_are_recalibrated():
    lengths = np.random.default_rng(0).integers(1, 6, 40)
    x, values = ragged(*lengths)
    inputs = keras.Input((None, 2), ragged=True)
    layer = keras_bn.BatchNormalization(momentum=0.0, name="bn")
    pool = keras.layers.Lambda(lambda t: tf.reduce_mean(t, axis=1))
    model = keras.Model(inputs, pool(layer(inputs)))
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((40, 2)), batch_size=40, verbose=0)
    np.testing.assert_allclose(array(layer.moving_mean), values.mean(0), rtol=1e-5)
    want = array(model(x, training=True))
    np.testing.assert_allclose(model.predict(x, verbose=0), want, atol=1e-2)
    data = tf.data.Dataset.from_tensor_slices(x).batch(8)
    keras_bn.recalibrate(model, data, verbose=0)
    np.testing.assert_allclose(array(layer.moving_variance), values.var(0), rtol=1e-4)


@ragged_only
def test_what_a_ragged_tensor_cannot_have_is_refused_in_words():
    x, _ = ragged(2, 1)
    layer = keras_bn.BatchNormalization()
    layer.build((None, None, 2))
    with pytest.raises(ValueError, match="mask of a ragged tensor must be a ragged"):
        layer(x, training=True, mask=np.ones((2, 2), bool))
    ghosts = keras_bn.BatchNormalization(virtual_batch_size=2)
    ghosts.build((None, None, 2))
    with pytest.raises(ValueError, match="`virtual_batch_size` cannot cut a ragged"):
        ghosts(x, training=True)
    with pytest.raises(ValueError, match="size of the channel axis must be known"):
        keras_bn.BatchNormalization(axis=1)(x)
