"""Models that other models use, and tensors given by keyword."""

import keras
import numpy as np
import pytest
from keras import layers
from support.backend import only
from support.marks import mostly_slow, takes_fake_quantization
from support.zoo import randomized

import keras_bn

SHAPE = (8, 8, 3)


def base():
    inputs = keras.Input(SHAPE)
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    return keras.Model(inputs, layers.ReLU(name="relu")(x), name="base")


def head(model):
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, layers.Flatten()(model(inputs)), name="head")


def base_of_a_classifier():
    model = base()
    head(model)
    return model


def base_of_several_models():
    model = base()
    first, second = keras.Input(SHAPE), keras.Input(SHAPE)
    keras.Model([first, second], layers.Add()([model(first), model(second)]))
    keras.Sequential([keras.Input(SHAPE), model, layers.Flatten()])
    return model


def sequential_base():
    model = keras.Sequential(
        [keras.Input(SHAPE), layers.Conv2D(4, 3), layers.BatchNormalization()]
    )
    head(model)
    return model


def one_of_two_classifiers():
    model = base()
    head(model)
    return head(model)


def in_the_middle():
    outer = head(base())
    inputs = keras.Input(SHAPE)
    keras.Model(inputs, layers.Dense(2)(outer(inputs)))
    return outer


def with_layers_that_another_model_calls():
    model = base()
    inputs = keras.Input(SHAPE)
    x = layers.Conv2D(2, 1)(model.get_layer("conv")(inputs))
    keras.Model(inputs, model.get_layer("relu")(x))
    keras.Model(model.inputs, model.get_layer("bn").output)
    return keras.Model(model.inputs, layers.GlobalMaxPooling2D()(model.output))


def attention_by_keyword():
    inputs = keras.Input((6, 4))
    x = layers.BatchNormalization()(layers.Dense(4)(inputs))
    x = layers.MultiHeadAttention(2, 4)(query=x, value=x)
    return keras.Model(inputs, layers.BatchNormalization()(layers.Dense(4)(x)))


def everything_by_keyword():
    inputs = keras.Input(SHAPE)
    x = layers.Conv2D(4, 3)(inputs=inputs)
    x = layers.ReLU()(inputs=layers.BatchNormalization()(inputs=x))
    x = layers.Concatenate()(inputs=[x, x])
    x = layers.BatchNormalization()(training=False, inputs=layers.Dense(3)(inputs=x))
    inner = keras.Input((6, 6, 3))
    y = layers.BatchNormalization()(inputs=layers.Conv2D(2, 1)(inputs=inner))
    return keras.Model(inputs, keras.Model(inner, y)(inputs=x))


def ops_by_keyword():
    inputs = keras.Input(SHAPE)
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs))
    x = keras.ops.add(x1=x, x2=keras.ops.relu(x=x))
    return keras.Model(inputs, keras.ops.mean(x=x, axis=(1, 2)))


MODELS = [
    base_of_a_classifier,
    base_of_several_models,
    sequential_base,
    one_of_two_classifiers,
    in_the_middle,
    with_layers_that_another_model_calls,
    attention_by_keyword,
    everything_by_keyword,
    ops_by_keyword,
]


USUAL = [base_of_a_classifier, in_the_middle, everything_by_keyword]


@pytest.mark.parametrize("make", mostly_slow(MODELS, USUAL))
def test_every_tool_takes_it(make, tmp_path):
    model = randomized(make())
    x = np.random.default_rng(0).normal(size=(32, *model.input_shape[1:]))

    def outputs(other):
        return keras.ops.convert_to_numpy(other(x))

    want = outputs(model)
    close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(want).max()}
    converted = keras_bn.from_keras(model)
    for other in (
        converted,
        keras_bn.to_keras(converted),
        keras_bn.fold(model),
        keras_bn.fold(converted),
    ):
        np.testing.assert_allclose(outputs(other), want, **close)
        other.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(outputs(loaded), want, **close)
    keras_bn.diagnose(converted, x)
    before = [layer.name for layer in model.layers]
    assert keras_bn.from_keras(model, in_place=True) is model
    assert [layer.name for layer in model.layers] == before
    keras_bn.freeze(model, fuse=True)
    np.testing.assert_allclose(outputs(model), want, **close)
    keras_bn.unfreeze(model)
    keras_bn.recalibrate(model, x, verbose=0)


@takes_fake_quantization
@only("tensorflow", "its converter")
@pytest.mark.parametrize("make", [base_of_several_models, everything_by_keyword])
def test_as_integers(make, tmp_path):
    model = randomized(make())
    x = np.random.default_rng(0).normal(size=(64, *SHAPE)).astype("float32")
    keras_bn.quantize_aware(model, x)
    assert keras_bn.export_int8(model, tmp_path / "model.tflite", x).error < 0.2


def test_the_other_model_does_not_change():
    model = base()
    classifier = randomized(head(model))
    x = np.random.default_rng(0).normal(size=(4, *SHAPE))
    want = keras.ops.convert_to_numpy(classifier(x))
    keras_bn.from_keras(model)
    keras_bn.fold(model)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(classifier(x)), want)
    keras_bn.from_keras(model, in_place=True)
    assert type(classifier.get_layer("base").get_layer("bn")) is (
        keras_bn.BatchNormalization
    )
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(classifier(x)), want, rtol=1e-4, atol=1e-4
    )
