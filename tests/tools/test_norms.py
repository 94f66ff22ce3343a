"""What a tool says of what it does not take."""

import keras
import numpy as np
import pytest
from conftest import require
from support import backend

import keras_bn
from keras_bn.surgery import norms

TOOLS = {
    "freeze": keras_bn.freeze,
    "unfreeze": keras_bn.unfreeze,
    "to_torch": keras_bn.to_torch,
    "normalizations": norms.normalizations,
}


def tf_keras_model():
    k = require("tf_keras")
    return k.Sequential([k.layers.BatchNormalization(input_shape=(3,))])


def tf_keras_layer():
    return require("tf_keras").layers.BatchNormalization()


def the_copy_in_tensorflow():
    backend.tensorflow("it holds a copy of Keras")
    return require("tensorflow.python.keras.layers").Dense(3)


def subclass_of_tf_keras():
    class Own(require("tf_keras").Model):
        pass

    return Own()


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("make", "package"),
    [
        (tf_keras_model, "tf_keras"),
        (tf_keras_layer, "tf_keras"),
        (subclass_of_tf_keras, "tf_keras"),
        (the_copy_in_tensorflow, r"tensorflow\.python\.keras"),
    ],
)
def test_models_of_another_keras_are_told_what_to_do(tool, make, package):
    if tool == "to_torch":
        require("torch")
    said = rf"which is of {package} and not of Keras 3.*save.*keras_bn\.load_model"
    with pytest.raises(TypeError, match=said):
        TOOLS[tool](make())


def test_what_it_says_works(tmp_path):
    model = tf_keras_model()
    with pytest.warns(UserWarning, match="saving your model as an HDF5 file"):
        model.save(tmp_path / "model.h5")
    loaded = keras_bn.load_model(tmp_path / "model.h5")
    assert keras_bn.freeze(loaded) == [model.layers[0].name]


@pytest.mark.parametrize("thing", ["model", None, np.ones(3), keras.layers.Dense])
def test_what_is_no_layer_at_all(thing):
    with pytest.raises(TypeError, match=r"Expected a Keras layer or model"):
        norms.check_layer(thing)
