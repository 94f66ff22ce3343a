"""load_model: files of Keras 3 and Keras 2, straight into our layers."""

import zipfile

import keras
import numpy as np
import pytest
from conftest import require
from keras import layers
from zoo import convolutional, inputs_of, randomized, sequential, wrapped

import keras_bn
from keras_bn.tools.convert import is_keras, is_ours
from keras_bn.tools.graph import walk


def kinds(model):
    found = [layer for _, layer in walk(model)]
    return sum(map(is_keras, found)), sum(map(is_ours, found))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("make", [convolutional, sequential, wrapped])
def test_files_of_keras_3(make, suffix, tmp_path):
    model = randomized(make())
    model.compile("adam", "mse")
    x = inputs_of(model)
    model.train_on_batch(x, model(x))
    model.save(tmp_path / f"model{suffix}")
    written = (tmp_path / f"model{suffix}").read_bytes()
    loaded = keras_bn.load_model(tmp_path / f"model{suffix}")
    assert (tmp_path / f"model{suffix}").read_bytes() == written
    theirs, ours = kinds(loaded)
    assert theirs == 0
    assert ours == kinds(model)[0] > 0
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert int(loaded.optimizer.iterations.numpy()) == 1
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def keras_2_model(k):
    k.utils.set_random_seed(0)
    x = k.Input((4,))
    inner = k.Model(x, k.layers.BatchNormalization(scale=False)(k.layers.Dense(4)(x)))
    image = k.Input((6, 6, 3))
    x = k.layers.Conv2D(4, 3)(image)
    x = k.layers.BatchNormalization(momentum=0.5, name="bn")(x)
    x = k.layers.ReLU()(x)
    return k.Model(image, inner(k.layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_of_keras_2(suffix, tmp_path):
    tf_keras = require("tf_keras")
    model = keras_2_model(tf_keras)
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, np.ones((8, 4)), epochs=3, verbose=0)
    path = tmp_path / f"model{suffix}"
    model.save(path)
    loaded = keras_bn.load_model(path)
    assert kinds(loaded) == (0, 2)
    assert loaded.get_layer("bn").axis == 3
    assert loaded.get_layer("bn").momentum == 0.5
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, atol=1e-6)
    assert np.std(expected) > 1e-2
    before = loaded.get_layer("bn").moving_mean.numpy()
    loaded.fit(x, np.ones((8, 4)), verbose=0)
    assert not np.allclose(loaded.get_layer("bn").moving_mean.numpy(), before)


@keras.saving.register_keras_serializable(package="keras_bn_tests")
class Registered(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.BatchNormalization(name="norm")

    def call(self, x):
        return self.norm(x)


def test_layers_that_a_class_makes_itself(tmp_path):
    model = Registered()
    model(np.ones((2, 3), "float32"))
    randomized(model).save(tmp_path / "model.keras")
    loaded = keras_bn.load_model(tmp_path / "model.keras")
    assert kinds(loaded) == (0, 1)
    np.testing.assert_array_equal(loaded.norm.moving_mean, model.norm.moving_mean)


def test_safe_mode_is_on(tmp_path):
    path = tmp_path / "model.keras"
    keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: x + 1)]).save(path)
    with pytest.raises(ValueError, match="safe_mode"):
        keras_bn.load_model(path)
    assert keras_bn.load_model(path, safe_mode=False)(np.ones((1, 3))).shape == (1, 3)


def test_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*gone.keras'"):
        keras_bn.load_model(tmp_path / "gone.keras")
    with pytest.raises(ValueError, match="is a folder"):
        keras_bn.load_model(tmp_path)
    (tmp_path / "text.keras").write_text("hello")
    with pytest.raises(ValueError, match="not a Keras model file"):
        keras_bn.load_model(tmp_path / "text.keras")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ValueError, match="not a Keras model file"):
        keras_bn.load_model(tmp_path / "other.zip")
