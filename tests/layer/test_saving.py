"""Keras's own files: configs, whole models, weights, and training resumed."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy as numpy
from support.alone import run_alone
from support.forms import (
    FORMS,
    OWN_CLASSES,
    assert_same_bits,
    conv_model,
    examples,
    model_of,
)
from support.marks import slow

import keras_bn

# One value other than the default for every argument.
OTHER = {
    "axis": [1, -1],
    "momentum": 0.7,
    "epsilon": 1e-5,
    "center": False,
    "scale": False,
    **OWN_CLASSES,
    "renorm": True,
    "renorm_clipping": {"rmin": 0.5, "rmax": 2.0, "dmax": 3.0},
    "renorm_momentum": 0.8,
    "synchronized": True,
    "virtual_batch_size": 8,
    "unbiased": True,
    "debias": True,
    "freeze_statistics": True,
    "freeze_affine": "gamma",
    "adapt_prior": 4.0,
    "adapt_memory": 0.5,
    # Of keras.layers.Layer:
    "name": "first",
    "dtype": "mixed_float16",
    "trainable": False,
}


def through_json(thing):
    """Serialized, written as text, read and made again, as a .keras file does it."""
    text = json.dumps(keras.saving.serialize_keras_object(thing))
    return keras.saving.deserialize_keras_object(json.loads(text))


def test_every_argument_is_among_those_tried():
    parameters = inspect.signature(keras_bn.BatchNormalization).parameters
    assert set(parameters) - {"kwargs"} == set(OTHER) - {"name", "dtype", "trainable"}


@pytest.mark.parametrize("argument", OTHER)
def test_config_keeps_every_argument(argument):
    layer = keras_bn.BatchNormalization(**{argument: OTHER[argument]})
    config = layer.get_config()
    default = keras_bn.BatchNormalization().get_config()
    assert config[argument] != default.get(argument)
    assert through_json(layer).get_config() == config
    again = keras_bn.BatchNormalization.from_config(config)
    assert again.get_config() == config
    assert isinstance(getattr(again, argument), type(getattr(layer, argument)))


@pytest.mark.parametrize("argument", OWN_CLASSES)
@pytest.mark.parametrize("value", [keras.saving.serialize_keras_object, None, "name"])
def test_initializers_and_the_like_in_any_spelling(argument, value):
    """Given by name, as None or as a serialized dict, they come back as they were."""
    if value == "name":
        kind = argument.rsplit("_", 1)[1]
        value = {"initializer": "he_normal", "regularizer": "l2"}.get(kind, "non_neg")
    elif value is not None:
        value = value(OWN_CLASSES[argument])
    layer = keras_bn.BatchNormalization(**{argument: value})
    assert through_json(layer).get_config() == layer.get_config()


def through_file(model, path, suffix):
    """The model saved to a file of that kind and loaded again."""
    path = path / f"model{suffix}"
    if suffix == ".weights.h5":
        model.save_weights(path)
        again = keras.models.clone_model(model)
        again.load_weights(path)
        return again
    model.save(path)
    return keras.saving.load_model(path)


@pytest.mark.parametrize("suffix", [".keras", slow(".weights.h5"), slow(".h5")])
@pytest.mark.parametrize("form", FORMS)
def test_file_keeps_the_layer(form, suffix, tmp_path):
    model = model_of(form)
    x = examples(model.input_shape[1:])
    want = model(x, training=False)
    again = through_file(model, tmp_path, suffix)

    assert_same_bits(again(x, training=False), want)
    (layer,), (copy,) = model.layers, again.layers
    assert copy is not layer
    assert type(copy) is keras_bn.BatchNormalization
    assert copy.get_config() == layer.get_config()
    assert_same_bits(again(x, training=True), model(x, training=True))
    assert copy.trainable == layer.trainable
    for weight, other in zip(layer.weights, copy.weights, strict=True):
        assert_same_bits(other, weight)
    for loss, other in zip(model.losses, again.losses, strict=True):
        assert_same_bits(other, loss)


def fit(model, steps, seed):
    """Train for some steps of a batch of 8, the same for the same seed."""
    x, y = examples((8, 8, 3), 8 * steps, seed), examples((5,), 8 * steps, seed + 50)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)


def compiled_model(dtype):
    """A model whose optimizer has state: moments and, for float16, the loss scale."""
    model = conv_model(dtype)
    optimizer = keras.optimizers.Adam(0.01)
    if dtype == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, keras.losses.MeanSquaredError())
    return model


@pytest.mark.parametrize("suffix", [".keras", slow(".weights.h5")])
@pytest.mark.parametrize("dtype", ["float32", slow("mixed_float16")])
def test_training_resumes_as_if_never_interrupted(dtype, suffix, tmp_path):
    model = compiled_model(dtype)
    fit(model, steps=3, seed=10)
    path = tmp_path / f"model{suffix}"
    if suffix == ".keras":
        model.save(path)
        resumed = keras.saving.load_model(path)
    else:
        model.save_weights(path)
        resumed = compiled_model(dtype)
        resumed.load_weights(path)
    for either in (model, resumed):
        fit(either, steps=3, seed=20)
    for weight, other in zip(model.weights, resumed.weights, strict=True):
        assert_same_bits(other, weight)
    states = model.optimizer.variables, resumed.optimizer.variables
    for state, other in zip(*states, strict=True):
        assert_same_bits(other, state)


def test_training_resumes_from_h5_with_a_new_optimizer(tmp_path):
    """Keras 3.15 does not restore the optimizer of a .h5 file, whatever the layers."""

    def compile_without_state(model):
        model.compile(keras.optimizers.SGD(0.01), keras.losses.MeanSquaredError())

    model = conv_model()
    compile_without_state(model)
    fit(model, steps=3, seed=10)
    model.save(tmp_path / "model.h5")
    resumed = keras.saving.load_model(tmp_path / "model.h5", compile=False)
    compile_without_state(resumed)
    for either in (model, resumed):
        fit(either, steps=3, seed=20)
    for weight, other in zip(model.weights, resumed.weights, strict=True):
        assert_same_bits(other, weight)


def test_importing_the_package_is_all_that_loading_needs(tmp_path):
    forms = ("2-D", "two axes", "float16", "renorm ramp", "ghost batches", "plain mean")
    for form in forms:
        model = model_of(form)
        x = examples(model.input_shape[1:])
        model.save(tmp_path / f"{form}.keras")
        np.savez(tmp_path / f"{form}.npz", x=x, y=numpy(model(x, training=False)))
    loaded = run_alone("load_keras_files.py", tmp_path)
    assert sorted(loaded) == sorted(forms)
