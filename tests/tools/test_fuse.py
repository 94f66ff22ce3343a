"""freeze(model, fuse=True): one computation, and everything else as it was."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.zoo import inputs_of, randomized

import keras_bn
from keras_bn.tools import fuse
from keras_bn.tools.copying import copy_model

OURS = keras_bn.BatchNormalization


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Fuse small layers too."""
    monkeypatch.setattr(fuse, "WORTH", 0)


# The linear layers, each with the shape of its input and the channel axis after it.
KINDS = {
    "Dense": (lambda: layers.Dense(4), (3,), -1),
    "Dense without bias": (lambda: layers.Dense(4, use_bias=False), (5, 3), -1),
    "EinsumDense": (
        lambda: layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d"),
        (5, 3),
        -1,
    ),
    "EinsumDense, heads": (
        lambda: layers.EinsumDense("abc,chd->abhd", (None, 2, 4), bias_axes="hd"),
        (5, 3),
        2,
    ),
    "EinsumDense, ellipsis": (
        lambda: layers.EinsumDense("...c,cd->...d", (4,)),
        (5, 3),
        -1,
    ),
    "Conv1D, causal": (
        lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2),
        (9, 3),
        -1,
    ),
    "Conv2D": (
        lambda: layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False),
        (7, 7, 3),
        -1,
    ),
    "Conv3D": (lambda: layers.Conv3D(4, 2), (4, 4, 4, 2), -1),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(4, 3, 2), (5, 3), -1),
    "Conv2DTranspose": (
        lambda: layers.Conv2DTranspose(4, 3, 2, padding="same"),
        (5, 5, 3),
        -1,
    ),
    "Conv3DTranspose": (
        lambda: layers.Conv3DTranspose(3, 2, use_bias=False),
        (3, 3, 3, 2),
        -1,
    ),
    "DepthwiseConv1D": (
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=2),
        (7, 3),
        -1,
    ),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False),
        (7, 7, 3),
        -1,
    ),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(4, 3), (7, 3), -1),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(4, 3, padding="same", use_bias=False),
        (7, 7, 3),
        -1,
    ),
}


def model_of(kind, **options):
    """A linear layer and a normalization, with weights as if trained."""
    make, shape, axis = KINDS[kind]
    keras.utils.set_random_seed(0)
    x = keras.Input(shape)
    y = OURS(axis, name="bn", **options)(make()(x))
    return randomized(keras.Model(x, layers.Flatten()(y)))


def pair_of(model, **options):
    """Two copies of a model, one frozen, the other fused as well."""
    frozen, fused = copy_model(model)[0], copy_model(model)[0]
    keras_bn.freeze(frozen)
    return frozen, fused, keras_bn.freeze(fused, fuse=True, **options)


@pytest.fixture
def float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def gradients(model, x, upstream, training=True, **how):
    """The output, and the gradients of the input and of every variable that trains."""
    weights = [v.value for v in model.trainable_variables]

    @tf.function(autograph=False, **how)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=training)
        return y, tape.gradient(y, [x, *weights], output_gradients=upstream)

    y, found = run(tf.constant(x))
    return [np.asarray(value) for value in (y, *found)]


def upstream_of(model, x):
    return np.random.default_rng(3).normal(size=model(x).shape)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_unfused_layers(kind, float64):
    model = model_of(kind)
    x = inputs_of(model)
    upstream = upstream_of(model, x)
    frozen, fused, (told,) = pair_of(model)
    assert told.into == model.layers[1].name
    asked = []
    again = fuse.Noting._again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse.Noting, "_again", lambda *a: asked.append(a) or again(*a))
        for training in (True, False):
            expected = gradients(frozen, x, upstream, training)
            found = gradients(fused, x, upstream, training)
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    assert len(asked) == 2


def chain(bn=OURS, dtype=None):
    """Convolutions with every neighbour that matters, and their data."""
    keras.utils.set_random_seed(1)
    x = image = keras.Input((8, 8, 3), dtype=dtype)
    x = layers.Conv2D(4, 3, use_bias=False, name="conv", dtype=dtype)(x)
    x = bn(name="bn", dtype=dtype)(x)
    x = layers.ReLU(dtype=dtype)(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise", dtype=dtype)(x)
    x = bn(name="bn_depthwise", momentum=0.9, dtype=dtype)(x)
    x = bn(name="bn_again", scale=False, dtype=dtype)(x)
    x = layers.ReLU(name="relu", dtype=dtype)(x)
    x = bn(name="bn_alone", dtype=dtype)(x)
    x = layers.GlobalAveragePooling2D(dtype=dtype)(x)
    x = layers.Dense(3, name="dense", dtype=dtype)(x)
    model = randomized(keras.Model(image, bn(name="bn_dense", dtype=dtype)(x)))
    rng = np.random.default_rng(2)
    return model, (rng.normal(size=(16, 8, 8, 3)), rng.normal(size=(16, 3)))


TOLD = [
    "bn -> conv",
    "bn_depthwise -> depthwise",
    "bn_again -> depthwise",
    "bn_alone stays: 'relu' before it is not linear",
    "bn_dense -> dense",
]


def test_it_tells_what_plan_fold_tells():
    model, _ = chain()
    assert [str(each) for each in keras_bn.freeze(model, fuse=True)] == TOLD
    assert all(la.freeze_statistics for la in model.layers if isinstance(la, OURS))
    again = keras_bn.freeze(model, fuse=True)
    assert [str(each) for each in again] == TOLD


def trained(model, data, steps=20, **options):
    """The weights after some steps with an optimizer that has state."""
    model.compile(keras.optimizers.Adam(0.01), "mse", **options)
    batch = len(data[0]) // 2
    model.fit(*data, batch, epochs=steps // 2, shuffle=False, verbose=0)
    return [v.numpy() for v in (*model.weights, *model.optimizer.variables)]


@pytest.mark.parametrize(
    "options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str
)
def test_twenty_steps_end_at_the_same_weights(options, float64):
    model, data = chain()
    frozen, fused, _ = pair_of(model)
    expected = trained(frozen, data, **options)
    for a, b in zip(trained(fused, data, **options), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    for layer in "evaluate", "predict":
        data_of = data if layer == "evaluate" else data[:1]
        np.testing.assert_allclose(
            getattr(fused, layer)(*data_of, verbose=0),
            getattr(frozen, layer)(*data_of, verbose=0),
            rtol=1e-9,
        )
