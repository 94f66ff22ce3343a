"""freeze and unfreeze: statistics that hold still to the bit, and start again."""

import keras
import numpy as np
import pytest
from keras import layers
from zoo import Subclassed, convolutional, inputs_of, nested, randomized, wrapped

import keras_bn
from keras_bn.tools.convert import is_ours
from keras_bn.tools.graph import walk

OURS = keras_bn.BatchNormalization


def statistics(model):
    return {
        path: np.stack([layer.moving_mean.numpy(), layer.moving_variance.numpy()])
        for path, layer in walk(model)
        if is_ours(layer)
    }


def moved(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


def compiled(model):
    model.compile("sgd", "mse")
    x = inputs_of(model, 8)
    y = keras.tree.map_structure(lambda t: np.ones(t.shape, "float32"), model(x))
    return model, x, y


@pytest.mark.parametrize("make", [convolutional, nested, wrapped])
def test_takes_effect_without_compiling_again(make):
    model, x, y = compiled(randomized(make(OURS)))
    all_of_them = set(statistics(model))
    model.train_on_batch(x, y)
    before, gamma = statistics(model), _gammas(model)
    assert set(keras_bn.freeze(model)) == all_of_them
    assert keras_bn.freeze(model) == []
    model.train_on_batch(x, y)
    model.fit(x, y, verbose=0)
    assert moved(before, statistics(model)) == set()
    assert not np.allclose(gamma, _gammas(model))
    assert set(keras_bn.unfreeze(model)) == all_of_them
    assert keras_bn.unfreeze(model) == []
    model.train_on_batch(x, y)
    assert moved(before, statistics(model)) == all_of_them


def _gammas(model):
    found = [la.gamma for _, la in walk(model) if is_ours(la) and la.gamma is not None]
    return np.concatenate([gamma.numpy() for gamma in found])


def test_mode_is_frozen_too():
    model, x, _ = compiled(randomized(convolutional(OURS)))
    keras_bn.freeze(model)
    np.testing.assert_array_equal(model(x, training=True), model(x, training=False))


def test_eager_loops():
    layer = OURS()
    x = np.random.default_rng(0).normal(3.0, 2.0, (8, 4)).astype("float32")
    layer(x, training=True)
    before = layer.moving_mean.numpy()
    assert keras_bn.freeze(layer) == [layer.name]
    layer(x, training=True)
    np.testing.assert_array_equal(before, layer.moving_mean.numpy())
    keras_bn.unfreeze(layer)
    layer(x, training=True)
    assert not np.allclose(before, layer.moving_mean.numpy())


def test_affine_parameters_by_argument():
    model, x, y = compiled(randomized(convolutional(OURS)))
    model.train_on_batch(x, y)
    gammas, count = _gammas(model), len(model.trainable_variables)
    kernel = model.layers[-1].kernel.numpy()
    assert len(keras_bn.freeze(model, affine=True)) == 3
    assert keras_bn.freeze(model, affine=True) == []
    assert len(model.trainable_variables) == count - 4
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(gammas, _gammas(model))
    assert not np.allclose(kernel, model.layers[-1].kernel.numpy())
    assert len(keras_bn.unfreeze(model, affine=True)) == 3
    model.train_on_batch(x, y)
    assert not np.allclose(gammas, _gammas(model))


def test_frozen_is_saved_and_copied(tmp_path):
    model = randomized(convolutional(OURS))
    keras_bn.freeze(model)
    model.save(tmp_path / "model.keras")
    for again in keras.saving.load_model(tmp_path / "model.keras"), model:
        assert keras_bn.freeze(again) == []


def test_transfer_learning_leaves_the_base_alone_to_the_bit():
    base = randomized(convolutional(OURS))
    keras_bn.freeze(base)
    x = image = keras.Input((12, 12, 3))
    x = layers.Dense(4)(base(x))
    x = OURS(name="head_norm")(x)
    model = keras.Model(image, layers.Dense(2)(x))
    before = statistics(model)
    data, y = inputs_of(model, 16), np.ones((16, 2))

    base.trainable = False
    model.compile("sgd", "mse")
    model.fit(data, y, verbose=0)
    kernel = base.layers[1].kernel.numpy()
    base.trainable = True  # fine-tuning
    model.compile("sgd", "mse")
    model.fit(data, y, verbose=0)
    assert moved(before, statistics(model)) == {"head_norm"}
    assert not np.array_equal(kernel, base.layers[1].kernel.numpy())

    base.layers[1].trainable = False
    keras_bn.unfreeze(model)
    model.compile("sgd", "mse")
    model.fit(data, y, verbose=0)
    assert moved(before, statistics(model)) == set(before)


def test_subclassed_models():
    model = Subclassed(bn=OURS)
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    model(x)
    assert len(keras_bn.freeze(model)) == 3
    before = statistics(model)
    model(x, training=True)
    assert moved(before, statistics(model)) == set()


def test_what_cannot_be_frozen():
    with pytest.raises(TypeError, match="Keras layer or model"):
        keras_bn.freeze("model")
    with pytest.raises(ValueError, match=r"no batch normalization.*from_keras"):
        keras_bn.freeze(convolutional())
    with pytest.raises(ValueError, match=r"to freeze\.$"):
        keras_bn.freeze(layers.Dense(3))
