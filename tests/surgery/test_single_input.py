"""One input in a structure, as files of Keras 2 have it: no pass warns of it."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from support.backend import only
from support.marks import takes_fake_quantization

import keras_bn

STRUCTURES = {
    "tensor": lambda i: i,
    "list": lambda i: [i],
    "tuple": lambda i: (i,),
    "dict": lambda i: {"image": i},
    "list in a dict": lambda i: {"images": [i]},
}


def model_of(structure):
    i = keras.Input((4, 4, 1), name="image")
    x = keras_bn.BatchNormalization(name="bn")(layers.Conv2D(2, 3, name="conv")(i))
    x = layers.Dense(2, name="head")(layers.Flatten()(layers.ReLU()(x)))
    model = keras.Model(STRUCTURES[structure](i), x)
    model.compile("sgd", "mse")
    return model


def data():
    x = np.random.default_rng(0).normal(size=(256, 4, 4, 1)).astype("float32")
    return x, np.zeros((256, 2), "float32")


def run_logged(model, x, y):
    callbacks = [keras_bn.StatisticsLogger(x), keras_bn.Recalibrate(x)]
    named = keras.tree.pack_sequence_as(model.input, [x])
    model.fit(named, y, verbose=0, callbacks=callbacks)


PASSES = {
    "recalibrate": lambda m, x, y: keras_bn.recalibrate(m, x, verbose=0),
    "exact": lambda m, x, y: keras_bn.recalibrate(m, x, exact=True, verbose=0),
    "diagnose": lambda m, x, y: keras_bn.diagnose(m, (x, y), verbose=0),
    "callbacks": run_logged,
}
INTEGERS = {
    "quantize_aware": lambda m, x, y, path: keras_bn.quantize_aware(m, x),
    "export_int8": lambda m, x, y, path: keras_bn.export_int8(m, path, x),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", PASSES)
def test_no_pass_warns_of_the_structure(structure, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*structure of `inputs`")
        PASSES[name](model_of(structure), *data())


@takes_fake_quantization
@only("tensorflow", "int8 runs there")
@pytest.mark.parametrize("structure", ["list", "dict"])
@pytest.mark.parametrize("name", INTEGERS)
def test_nor_does_what_makes_integers(structure, name, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*structure of `inputs`")
        INTEGERS[name](model_of(structure), *data(), tmp_path / "a.tflite")


def test_the_numbers_are_those_of_a_tensor():
    x, _ = data()
    moments = []
    for structure in STRUCTURES:
        keras.utils.set_random_seed(0)
        moments.append(keras_bn.recalibrate(model_of(structure), x, verbose=0)["bn"])
    for other in moments[1:]:
        np.testing.assert_allclose(other.mean, moments[0].mean, rtol=1e-6)
        np.testing.assert_allclose(other.variance, moments[0].variance, rtol=1e-6)
