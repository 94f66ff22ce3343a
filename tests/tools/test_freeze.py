"""freeze and unfreeze: statistics that hold still to the bit, and start again."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import layers
from support.backend import NAME, array, but_on, descend
from support.marks import mostly_slow, slow
from support.zoo import (
    Subclassed,
    convolutional,
    inputs_of,
    nested,
    randomized,
    wrapped,
)

import keras_bn
from keras_bn.surgery.graph import walk
from keras_bn.tools.convert import is_ours

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


def compile_again(model, **options):
    """As on JAX after other variables train: Keras's optimizer asks for it there."""
    if NAME == "jax":
        model.compile("sgd", "mse", **options)


@pytest.mark.parametrize(
    "make",
    [
        slow(convolutional),
        nested,
        pytest.param(
            wrapped,
            marks=[
                pytest.mark.slow,
                but_on("jax", "Keras cannot train a recurrent cell with state there"),
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*are layers of Keras")
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
    np.testing.assert_array_equal(
        array(model(x, training=True)), array(model(x, training=False))
    )


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
    compile_again(model)
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(gammas, _gammas(model))
    assert not np.allclose(kernel, model.layers[-1].kernel.numpy())
    assert len(keras_bn.unfreeze(model, affine=True)) == 3
    compile_again(model)
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


def simple(**options):
    """A compiled model of one normalization between two dense layers, and its data."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, name="dense"),
            OURS(name="bn"),
            layers.Dense(1, name="head"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse", **options)
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (16, 4)).astype("float32")
    return model, model.get_layer("bn"), (x, rng.normal(size=(16, 1)))


def values(layer):
    return {v.name: v.numpy() for v in layer.variables}


def held(layer, run):
    """The names of the variables of a layer that a run leaves alone, to the bit."""
    before = values(layer)
    run()
    after = values(layer)
    return {name for name in before if np.array_equal(before[name], after[name])}


STATISTICS = {"moving_mean", "moving_variance"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        slow({"run_eagerly": True}),
        pytest.param(
            {"jit_compile": True},
            marks=[pytest.mark.slow, but_on("torch", "it needs a C++ compiler")],
        ),
        pytest.param(
            {"steps_per_execution": 2},
            marks=[pytest.mark.slow, but_on("torch", "Keras refuses it there")],
        ),
    ],
    ids=str,
)
def test_the_attribute_of_a_live_layer_takes_effect_in_the_next_fit(options):
    model, layer, data = simple(**options)

    def fit():
        model.fit(*data, batch_size=8, verbose=0)

    assert held(layer, fit) == set()
    layer.freeze_statistics = True
    assert held(layer, fit) == STATISTICS
    for affine, statistics, expected in (
        (True, True, STATISTICS | {"gamma", "beta"}),
        ("gamma", False, {"gamma"}),
        ("beta", False, {"beta"}),
        (False, False, set()),
    ):
        layer.freeze_statistics, layer.freeze_affine = statistics, affine
        compile_again(model, **options)
        assert held(layer, fit) == expected


def test_other_ways_to_train_heed_it_too():
    model, layer, data = simple()
    runs = [
        lambda: model.train_on_batch(*data),
        lambda: model.fit(*data, verbose=0),
        lambda: layer(data[0] @ np.ones((4, 5), "float32"), training=True),
    ]
    for run in runs:
        assert not STATISTICS & held(layer, run)
    layer.freeze_statistics = True
    for run in runs:
        assert held(layer, run) >= STATISTICS


def test_in_the_midst_of_a_fit():
    model, layer, data = simple()
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(layer.moving_mean.numpy())
            layer.freeze_statistics = epoch >= 2

    model.fit(*data, batch_size=4, epochs=4, verbose=0, callbacks=[Watch()])
    assert not np.array_equal(seen[1], seen[2])
    np.testing.assert_array_equal(seen[2], seen[3])
    np.testing.assert_array_equal(seen[3], layer.moving_mean.numpy())


def test_a_model_that_holds_the_frozen_one_heeds_it():
    base, layer, data = simple()
    outer = keras.Sequential([keras.Input((4,)), base])
    outer.compile("sgd", "mse")
    outer.fit(*data, verbose=0)
    keras_bn.freeze(base)
    assert held(layer, lambda: outer.fit(*data, verbose=0)) == STATISTICS


class Adversary(keras.Model):
    """A model with a compile and a step of its own, which never calls itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.built = True  # PyTorch's `fit` would call it to find out

    def compile(self, inner_optimizer):
        super().compile()
        self.inner_optimizer = inner_optimizer

    def train_step(self, data):
        def loss():
            return keras.ops.mean(keras.ops.square(self.inner(data, training=True)))

        weights = self.inner.trainable_variables
        return {"loss": descend(loss, self.inner_optimizer, weights)}


@but_on("jax", "a training step there is written without effects")
@pytest.mark.parametrize("by_tool", [True, False])
def test_a_model_with_a_step_of_its_own_heeds_it(by_tool):
    inner, layer, (x, _) = simple()
    model = Adversary(inner)
    model.compile(keras.optimizers.SGD(0.01))
    assert held(layer, lambda: model.fit(x, verbose=0)) == set()
    if by_tool:
        keras_bn.freeze(inner)
    else:
        layer.freeze_statistics = True
    assert held(layer, lambda: model.fit(x, verbose=0)) == STATISTICS


def test_predictions_go_on_as_before():
    model, layer, (x, _) = simple()
    expected = model.predict(x, verbose=0)
    layer.freeze_statistics = True
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


def by_keras_file(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def by_h5_file(model, folder):
    model.save(folder / "model.h5")
    return keras.saving.load_model(folder / "model.h5", compile=False)


def by_clone(model, folder):
    again = keras.models.clone_model(model)
    again.set_weights(model.get_weights())
    return again


def by_deepcopy(model, folder):
    return copy.deepcopy(model)


def by_pickle(model, folder):
    return pickle.loads(pickle.dumps(model))


def by_config(model, folder):
    again = keras.Sequential.from_config(model.get_config())
    again.set_weights(model.get_weights())
    return again


def by_thawing_the_base(model, folder):
    model.trainable = False
    model.trainable = True
    return model


@pytest.mark.parametrize("affine", mostly_slow([True, "gamma", "beta"], ["gamma"]))
@pytest.mark.parametrize(
    "way",
    [
        by_keras_file,
        by_h5_file,
        by_clone,
        by_deepcopy,
        by_pickle,
        by_config,
        by_thawing_the_base,
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*HDF5")
def test_what_is_frozen_stays_frozen(way, affine, tmp_path):
    model, layer, data = simple()
    layer.freeze_affine = affine
    randomized(model)
    again = way(model, tmp_path)
    new = again.get_layer("bn")
    for name, value in values(layer).items():
        np.testing.assert_array_equal(values(new)[name], value, err_msg=name)
    frozen = {"gamma", "beta"} if affine is True else {affine}
    assert new.freeze_affine == affine
    assert {w.name for w in new.weights if not w.trainable} == frozen | STATISTICS
    again.compile("sgd", "mse", run_eagerly=True)
    assert held(new, lambda: again.fit(*data, verbose=0)) == frozen
    assert keras_bn.unfreeze(again, affine=True) == ["bn"]
    assert keras_bn.unfreeze(again, affine=True) == []
    again.compile("sgd", "mse", run_eagerly=True)
    assert held(new, lambda: again.fit(*data, verbose=0)) == set()


def test_the_weights_are_kerass_four_and_the_config_has_one_key_more():
    frozen, plain = OURS(freeze_affine="gamma"), OURS()
    for layer in (frozen, plain):
        layer.build((None, 3))
    names = ["gamma", "beta", "moving_mean", "moving_variance"]
    assert [w.name for w in frozen.weights] == names
    assert set(frozen.get_config()) - set(plain.get_config()) == {"freeze_affine"}
    assert "freeze_affine" not in plain.get_config()


def test_a_layer_that_does_not_train_is_not_set_training():
    layer = OURS(freeze_affine=True, trainable=False)
    layer.build((None, 3))
    layer.freeze_affine = False
    assert not any(w.trainable for w in layer.weights)
    layer.trainable = True
    assert [w.name for w in layer.trainable_weights] == ["gamma", "beta"]


@pytest.mark.parametrize("value", [None, "alpha", 2, ["gamma"]])
def test_what_freeze_affine_may_be(value):
    with pytest.raises(
        ValueError, match="`freeze_affine` must be True, False, 'gamma'"
    ):
        OURS(freeze_affine=value)


def test_layers_of_keras_in_a_mixed_model_are_named():
    model = keras.Sequential(
        [keras.Input((3,)), OURS(name="ours"), layers.BatchNormalization(name="theirs")]
    )
    with pytest.warns(UserWarning, match="'theirs' are layers of Keras.*from_keras"):
        assert keras_bn.freeze(model) == ["ours"]


class Activated(OURS):
    def call(self, inputs, training=None, mask=None):
        return keras.ops.relu(super().call(inputs, training=training, mask=mask))


class Renamed(OURS):
    """A subclass with defaults of its own."""


def test_subclasses():
    model = keras.Sequential(
        [keras.Input((3,)), Renamed(name="plain"), Activated(name="own")]
    )
    with pytest.warns(UserWarning, match="'own' are of subclasses with a `call`"):
        assert keras_bn.freeze(model) == ["plain", "own"]
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    for layer in model.layers:
        assert held(layer, lambda: model(x, training=True)) >= STATISTICS


def test_what_cannot_be_frozen():
    with pytest.raises(TypeError, match="Keras layer or model"):
        keras_bn.freeze("model")
    with pytest.raises(ValueError, match=r"no batch normalization.*from_keras"):
        keras_bn.freeze(convolutional())
    with pytest.raises(ValueError, match=r"to freeze\.$"):
        keras_bn.freeze(layers.Dense(3))
