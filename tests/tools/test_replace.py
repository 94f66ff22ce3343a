"""replace: another layer in the place of each normalization, on every kind of model."""

import applications
import keras
import numpy as np
import pytest
from keras import layers
from support.backend import array
from support.zoo import (
    GRAPHS,
    Subclassed,
    convolutional,
    inputs_of,
    masked,
    nested,
    randomized,
    sequential,
)

import keras_bn
from keras_bn.surgery.graph import walk

NORMS = (layers.BatchNormalization, keras_bn.BatchNormalization)
KINDS = pytest.mark.parametrize("bn", NORMS, ids=("keras", "ours"))


def found(model, kind):
    return [layer for _, layer in walk(model) if isinstance(layer, kind)]


def subclassed(bn):
    model = Subclassed(bn=bn)
    model(np.zeros((2, 6), "float32"))
    return model


def first(structure, count):
    return keras.tree.map_structure(lambda x: x[:count], structure)


@KINDS
@pytest.mark.parametrize("make", [m for m in GRAPHS if m is not masked])
def test_no_sample_depends_on_another(make, bn):
    model = randomized(make(bn))
    before = [array(v) for v in model.variables]
    replaced = keras_bn.replace(model)
    assert not found(replaced, NORMS)
    assert len(found(replaced, layers.GroupNormalization)) == len(found(model, NORMS))
    for layer in found(replaced, layers.Dropout):
        layer.rate = 0.0
    x = inputs_of(model, 6)
    whole = replaced(x, training=True)
    alone = replaced(first(x, 1), training=True)
    for a, b in zip(*map(keras.tree.flatten, (whole, alone)), strict=True):
        np.testing.assert_allclose(array(a)[:1], array(b), rtol=1e-4, atol=1e-5)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)


@KINDS
def test_a_subclassed_model(bn):
    model = subclassed(bn)
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    replaced = keras_bn.replace(model)
    assert type(replaced) is Subclassed
    whole, alone = replaced(x, training=True), replaced(x[:1], training=True)
    np.testing.assert_allclose(array(whole)[:1], array(alone), rtol=1e-4, atol=1e-5)


class Passing(keras.Model):
    """Passes an argument to its normalizations, which have one name."""

    def __init__(self, mask=None):
        super().__init__()
        self.dense = [layers.Dense(4), layers.Dense(3)]
        self.norms = [keras_bn.BatchNormalization(name="norm") for _ in range(2)]
        self.mask = mask

    def call(self, x):
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = norm(dense(x), mask=self.mask and self.mask(x))
        return x


def test_a_subclassed_model_whose_code_passes_arguments(tmp_path):
    model = Passing()
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    model(x)
    replaced = keras_bn.replace(model)
    assert len(found(replaced, layers.GroupNormalization)) == 2
    whole, alone = replaced(x, training=True), replaced(x[:1], training=True)
    np.testing.assert_allclose(array(whole)[:1], array(alone), rtol=1e-4, atol=1e-5)
    assert [norm.name for norm in model.norms] == ["norm", "norm"]
    replaced.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(array(loaded(x)), array(whole), rtol=1e-5)
    model.mask = lambda x: keras.ops.any(x > 0, -1)
    with pytest.raises(ValueError, match="'norm' would be called with `mask`"):
        keras_bn.replace(model)


@pytest.mark.parametrize(
    ("shape", "options", "groups"),
    [
        ((6, 6, 48), {}, 24),
        ((6, 6, 64), {}, 32),
        ((6, 6, 7), {}, 7),
        ((6, 6, 67), {}, 1),
        ((48, 6, 6), {"axis": 1}, 24),
        ((None, 96), {}, 32),
        ((16,), {}, 1),
        ((1, 1, 16), {}, 1),
    ],
)
def test_the_number_of_groups(shape, options, groups):
    norm = keras_bn.BatchNormalization(name="norm", epsilon=1e-5, **options)
    model = keras.Sequential([keras.Input(shape), norm])
    layer = keras_bn.replace(model, "group").get_layer("norm")
    assert (layer.groups, layer.epsilon) == (groups, 1e-5)
    x = np.random.default_rng(0).normal(size=(2, *(n or 9 for n in shape)))
    y = array(layer(x.astype("float32")))
    assert np.abs(y).max() > 0.5  # a group of one element would give zeros


def test_gamma_beta_and_the_options_are_taken_over():
    model = randomized(convolutional(keras_bn.BatchNormalization))
    model.get_layer("first").trainable = False
    replaced = keras_bn.replace(model)
    for name in ("first", "second", "after_add"):
        old, new = model.get_layer(name), replaced.get_layer(name)
        assert (old.scale, old.center) == (new.scale, new.center)
        assert old.trainable == new.trainable
        for part in ("gamma", "beta"):
            if getattr(old, part) is not None:
                values = array(getattr(old, part)), array(getattr(new, part))
                np.testing.assert_array_equal(*values)
    assert replaced.get_layer("after_add").gamma_regularizer is not None


def test_it_trains_and_is_saved(tmp_path):
    model = keras_bn.replace(randomized(sequential(keras_bn.BatchNormalization)))
    model.compile("sgd", "mse")
    x = inputs_of(model, 8)
    gamma = array(model.get_layer("first").gamma)
    model.fit(x, np.ones((8, 3)), verbose=0)
    assert np.abs(array(model.get_layer("first").gamma) - gamma).max() > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(*(m.predict(x, verbose=0) for m in (model, loaded)))


def test_a_function_decides_layer_by_layer():
    def by(norm):
        if norm.name == "first":
            return None
        return layers.LayerNormalization(name=norm.name)

    model = randomized(convolutional())
    replaced = keras_bn.replace(model, by)
    assert type(replaced.get_layer("first")) is layers.BatchNormalization
    layer = replaced.get_layer("second")
    assert type(layer) is layers.LayerNormalization
    beta = model.get_layer("second").beta
    np.testing.assert_array_equal(array(layer.beta), array(beta))


def test_a_shared_normalization_stays_shared():
    replaced = keras_bn.replace(randomized(nested()))
    assert len(found(replaced, layers.GroupNormalization)) == 1


def test_a_layer_alone():
    norm = keras_bn.BatchNormalization(name="norm")
    norm.build((None, 5, 4))
    layer = keras_bn.replace(norm)
    assert type(layer) is layers.GroupNormalization
    assert type(keras_bn.replace(norm, lambda _: None)) is type(norm)


def test_what_is_refused():
    model = randomized(masked())
    with pytest.raises(ValueError, match="would be called with `mask`, which Group"):
        keras_bn.replace(model)
    # A layer that takes a mask can stand there.
    keras_bn.replace(model, lambda norm: keras_bn.BatchNormalization(name=norm.name))
    model = sequential()
    shared = layers.LayerNormalization()
    convolutions = convolutional()
    for by, error, match in [
        ("layer", ValueError, "`by` must be 'group' or a function"),
        (lambda norm: 3, TypeError, "`by` must give a layer.*Received: 3"),
        (lambda norm: shared, ValueError, "'first' and for 'second'"),
    ]:
        with pytest.raises(error, match=match):
            keras_bn.replace(convolutions, by)
    axes = keras.Sequential(
        [keras.Input((3, 4)), keras_bn.BatchNormalization(axis=[1, 2])]
    )
    with pytest.raises(ValueError, match="along one axis"):
        keras_bn.replace(axes)
    with pytest.raises(ValueError, match="no batch normalization"):
        keras_bn.replace(keras.Sequential([keras.Input((3,)), layers.Dense(2)]))
    with pytest.raises(TypeError, match="Expected a Keras layer or model"):
        keras_bn.replace("model")
    assert found(model, NORMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, id=n if n in applications.SUBSET else f"application-{n}")
        for n in applications.names()
    ],
)
def test_every_application(name):
    model = applications.build(name)
    replaced = keras_bn.replace(model)
    assert not found(replaced, NORMS)
    shape = (3, *model.input_shape[1:])
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    whole, alone = replaced(x), replaced(x[:1])
    largest = np.abs(array(whole)).max()
    np.testing.assert_allclose(array(whole)[:1], array(alone), atol=1e-3 * largest)
