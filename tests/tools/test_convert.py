"""from_keras and to_keras: everything the same but the layer."""

import inspect

import keras
import numpy as np
import pytest
from keras import layers
from support import backend
from support.backend import array
from support.zoo import (
    GRAPHS,
    Residual,
    Subclassed,
    convolutional,
    inputs_of,
    nested,
    randomized,
    sequential,
)

import keras_bn
from keras_bn.surgery.graph import walk

KERAS = layers.BatchNormalization
OURS = keras_bn.BatchNormalization
HAS_RENORM = "renorm" in inspect.signature(KERAS).parameters


def norms(model, kind=(KERAS, OURS)):
    return {path: layer for path, layer in walk(model) if isinstance(layer, kind)}


def assert_same_outputs(a, b, x, rtol=1e-5, atol=1e-5):
    a, b = a(x, training=False), b(x, training=False)
    a, b = keras.tree.flatten(a), keras.tree.flatten(b)
    assert len(a) == len(b) > 0
    for mine, theirs in zip(map(array, a), map(array, b), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)
        assert np.std(mine) > 1e-3


@pytest.mark.parametrize("make", GRAPHS)
def test_models_round_trip(make):
    model = randomized(make())
    before = [v.numpy() for v in model.variables]
    ours = keras_bn.from_keras(model)
    back = keras_bn.to_keras(ours)
    x = inputs_of(model)
    assert norms(model, KERAS)
    assert not norms(model, OURS)
    assert norms(ours, OURS).keys() == norms(model).keys() == norms(back, KERAS).keys()
    assert not norms(ours, KERAS)
    assert not norms(back, OURS)
    assert type(ours) is type(model)
    assert ours.name == model.name
    assert_same_outputs(model, ours, x)
    assert_same_outputs(model, back, x, rtol=0, atol=0)
    for a, b, c, was in zip(
        model.variables, ours.variables, back.variables, before, strict=True
    ):
        np.testing.assert_array_equal(a, was)
        np.testing.assert_array_equal(b, was)
        np.testing.assert_array_equal(c, was)
        assert a.trainable == b.trainable == c.trainable
        assert len({id(a), id(b), id(c)}) == 3
    assert [p for p, _ in walk(model)] == [p for p, _ in walk(ours)]


def test_a_layer_alone_built_or_not():
    layer = KERAS(momentum=0.7, scale=False, name="norm", dtype="float64")
    fresh = keras_bn.from_keras(layer)
    assert (fresh.momentum, fresh.name, fresh.built) == (0.7, "norm", False)
    layer.build((None, 3))
    layer.moving_mean.assign([1.0, 2.0, 3.0])
    built = keras_bn.from_keras(layer)
    np.testing.assert_array_equal(built.moving_mean, [1.0, 2.0, 3.0])
    assert type(keras_bn.to_keras(built)) is KERAS
    assert built.dtype_policy.name == "float64"


def test_config_is_carried():
    layer = KERAS(
        axis=1,
        momentum=0.8,
        epsilon=1e-4,
        center=False,
        gamma_initializer=keras.initializers.Constant(0.5),
        gamma_regularizer=keras.regularizers.L2(0.1),
        gamma_constraint="non_neg",
        synchronized=backend.KERAS_IS_A_JUDGE,  # elsewhere it refuses it
        trainable=False,
        dtype="mixed_float16",
        name="norm",
    )
    config = keras_bn.from_keras(layer).get_config()
    assert {k: config[k] for k in layer.get_config()} == layer.get_config()


def test_flags_policies_and_regularization_losses_are_carried():
    model = convolutional()
    model.get_layer("first").trainable = False
    model.layers[1].kernel.trainable = False
    ours = keras_bn.from_keras(model)
    assert [w.path for w in ours.trainable_weights] == [
        w.path for w in model.trainable_weights
    ]
    assert len(ours.trainable_weights) < len(convolutional().trainable_weights)
    np.testing.assert_allclose(array(sum(ours.losses)), array(sum(model.losses)))
    model.trainable = False
    assert not keras_bn.from_keras(model).trainable
    assert keras_bn.from_keras(model).trainable_weights == []


def test_mixed_precision_is_carried():
    with_policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, dtype=with_policy),
            KERAS(dtype=with_policy),
            layers.Dense(2),
        ]
    )
    ours = keras_bn.from_keras(model)
    assert [la.dtype_policy.name for la in ours.layers] == [
        la.dtype_policy.name for la in model.layers
    ]


def test_shared_layers_stay_shared_across_nested_models():
    ours = keras_bn.from_keras(nested())
    middle = ours.get_layer("middle")
    assert middle.get_layer("inner_norm") is middle.get_layer("block").layers[-1]
    assert len(norms(ours)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "scaled", "ema"])
def test_training_goes_on_as_if_nothing_had_happened(optimizer):
    if optimizer == "ema" and backend.NAME == "jax":
        pytest.skip("on JAX, Keras fits no second time with averaged weights")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8)), rng.normal(size=(64, 3))
    made = {
        "adam": lambda: keras.optimizers.Adam(1e-2),
        "scaled": lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(1e-2), initial_scale=4.0
        ),
        "ema": lambda: keras.optimizers.SGD(1e-2, momentum=0.9, use_ema=True),
    }

    def my_loss(y, p):
        return keras.ops.mean((y - p) ** 2, -1)

    model = randomized(sequential())
    model.compile(
        made[optimizer](), my_loss, metrics=["mae", keras.metrics.MeanSquaredError()]
    )
    model.layers[0].trainable = False
    options = {"batch_size": 16, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=2, **options)
    model.optimizer.learning_rate = 5e-3
    ours = keras_bn.from_keras(model)
    assert int(ours.optimizer.iterations.numpy()) == 8
    unseen = keras_bn.from_keras(model)
    unseen.optimizer.iterations.assign(0)  # what losing the state would look like
    # On PyTorch, dropout draws from one generator for all layers.
    keras.utils.set_random_seed(1)
    a = model.fit(x, y, epochs=3, **options).history
    keras.utils.set_random_seed(1)
    b = ours.fit(x, y, epochs=3, **options).history
    assert a.keys() == b.keys()
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
    for mine, theirs in zip(model.variables, ours.variables, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(
        model.optimizer.variables, ours.optimizer.variables, strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=1e-4)
    if optimizer == "adam":
        unseen.fit(x, y, epochs=3, **options)
        kernel = model.layers[-1].kernel.numpy()
        assert np.abs(unseen.layers[-1].kernel.numpy() - kernel).max() > 1e-3


def test_lambdas_and_adapted_layers_are_carried():
    scale = 3.0
    text = keras.Input((1,), dtype="string")
    backend.tensorflow("TextVectorization needs it")
    vectorized = layers.TextVectorization(output_sequence_length=4)
    vectorized.adapt(["red green blue"])
    x = layers.Embedding(10, 4)(vectorized(text))
    x = layers.Lambda(lambda t: t * scale)(KERAS()(x))
    model = keras.Model(text, x)
    ours = keras_bn.from_keras(model)
    words = np.array([["blue red"], ["green"]], dtype=object)
    words = keras.ops.convert_to_tensor(words.tolist(), dtype="string")
    np.testing.assert_allclose(array(model(words)), array(ours(words)), rtol=1e-6)

    normalize = layers.Normalization()
    normalize.adapt(np.random.default_rng(0).normal(2.0, 3.0, (50, 4)))
    model = keras.Sequential([keras.Input((4,)), normalize, KERAS()])
    assert_same_outputs(model, keras_bn.from_keras(model), inputs_of(model))


def test_subclassed_model_from_its_config():
    model = Subclassed()
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    model(x)
    randomized(model).compile("adam", "mse")
    model.train_on_batch(x, np.ones((6, 3)))
    ours = keras_bn.from_keras(model)
    assert type(ours) is Subclassed
    assert set(norms(ours, OURS)) == set(norms(model))
    assert len(norms(ours, OURS)) == 3
    assert_same_outputs(model, ours, x)
    for _ in range(2):
        model.train_on_batch(x, np.ones((6, 3)))
        ours.train_on_batch(x, np.ones((6, 3)))
    for mine, theirs in zip(model.variables, ours.variables, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    assert_same_outputs(ours, keras_bn.to_keras(ours), x)


@pytest.mark.slow
def test_subclassed_model_without_a_config():
    class NoConfig(keras.Model):
        def __init__(self, inner, units):
            super().__init__()
            self.inner, self.units = inner, units
            self.norm, self.dense = KERAS(), layers.Dense(units)
            self.blocks = (Residual(5), [Residual(5)])

        def call(self, x):
            x = self.blocks[1][0](self.blocks[0](self.inner(x)))
            return self.dense(self.norm(x))

    inner = keras.Sequential([keras.Input((5,)), layers.Dense(5), KERAS()])
    model = NoConfig(inner, 2)
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    twin = NoConfig(keras_bn.to_keras(inner), 2)
    for each in model, twin:
        each(x)
        each.compile("adam", "mse")
    twin.set_weights(randomized(model).get_weights())
    assert_same_outputs(model, keras_bn.from_keras(model), x)
    assert len(norms(model, KERAS)) == 8
    for each in model, twin:
        each.train_on_batch(x, np.ones((6, 2)))
    assert keras_bn.from_keras(model, in_place=True) is model
    assert not norms(model, KERAS)
    assert len(norms(model, OURS)) == 8
    assert_same_outputs(model, twin, x)
    for _ in range(2):
        for each in model, twin:
            each.train_on_batch(x, np.ones((6, 2)))
    for mine, theirs in zip(model.variables, twin.variables, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_unbuilt_models():
    model = keras.Sequential([layers.Dense(3), KERAS(), layers.ReLU()])
    ours = keras_bn.from_keras(model)
    assert not ours.built
    assert isinstance(ours.layers[1], OURS)
    assert ours(np.ones((2, 4), "float32")).shape == (2, 3)


def test_functional_model_with_a_training_step_of_its_own():
    class Own(keras.Model):
        def train_step(self, data):
            return {"steps": 7.0}

    x = keras.Input((4,))
    ours = keras_bn.from_keras(Own(x, KERAS()(x)))
    assert type(ours) is Own

    class MakesItself(keras.Model):
        def __init__(self, units):
            x = keras.Input((4,))
            super().__init__(x, KERAS()(layers.Dense(units)(x)), name="itself")

    model = randomized(MakesItself(3))
    ours = keras_bn.from_keras(model)
    assert type(ours) is MakesItself
    assert_same_outputs(model, ours, inputs_of(model))


def test_subclasses():
    class Special(KERAS):
        def __init__(self, favourite, **kwargs):
            super().__init__(momentum=0.5, **kwargs)
            self.favourite = favourite

    class Scaled(KERAS):
        def call(self, x, training=None, mask=None):
            return 2.0 * super().call(x, training=training, mask=mask)

    class OurScaled(OURS):
        def call(self, x, training=None, mask=None):
            return 2.0 * super().call(x, training=training, mask=mask)

    class WithMore(KERAS):
        def build(self, input_shape):
            super().build(input_shape)
            self.extra = self.add_weight(shape=(), name="extra")

    def model(layer):
        return keras.Sequential([keras.Input((4,)), layer, KERAS(), OURS()])

    ours = keras_bn.from_keras(model(Special(7)))
    assert [type(la) for la in ours.layers] == [OURS, OURS, OURS]
    assert ours.layers[0].momentum == 0.5
    for in_place in (False, True):
        refused = model(Scaled(name="doubled"))
        with pytest.raises(ValueError, match=r"'doubled': Scaled.*of its own"):
            keras_bn.from_keras(refused, in_place=in_place)
        assert [type(la) for la in refused.layers] == [Scaled, KERAS, OURS]
        refused = model(OurScaled(name="doubled"))
        with pytest.raises(ValueError, match=r"'doubled': OurScaled.*of its own"):
            keras_bn.to_keras(refused, in_place=in_place)
        assert [type(la) for la in refused.layers] == [OurScaled, KERAS, OURS]
        refused = model(WithMore(name="more"))
        with pytest.raises(ValueError, match="'more': WithMore has the weights extra"):
            keras_bn.from_keras(refused, in_place=in_place)
        assert [type(la) for la in refused.layers] == [WithMore, KERAS, OURS]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"axis": [1, 2]}, r"axis=\[1, 2\]"),
        ({"virtual_batch_size": 4}, "virtual_batch_size=4"),
        ({"unbiased": True}, "unbiased=True"),
        ({"debias": True}, "debias=True"),
        ({"freeze_affine": "beta"}, "freeze_affine='beta'"),
        ({"momentum": None}, "momentum=None"),
        (
            {"renorm": True, "renorm_clipping": keras_bn.renorm_ramp()},
            r"renorm_clipping\['rmax'\]",
        ),
    ],
)
def test_to_keras_names_what_keras_lacks(options, named):
    layer = OURS(**options, name="norm")
    with pytest.raises(ValueError, match=f"{named}.*'norm'"):
        keras_bn.to_keras(layer)


def frozen_in_part():
    """A model with a layer of each kind, and which of them train gamma and beta."""
    kinds = {
        "statistics": {"freeze_statistics": True},
        "no_scale": {"freeze_statistics": True, "scale": False},
        "gamma_too": {"freeze_statistics": True, "freeze_affine": "gamma"},
        "all": {"freeze_statistics": True, "freeze_affine": True},
        "no_affine": {"freeze_statistics": True, "scale": False, "center": False},
        "not_trainable": {"freeze_affine": True, "trainable": False},
        "free": {},
    }
    parts = [
        layers.Dense(4, name="dense"),
        *(OURS(name=n, **how) for n, how in kinds.items()),
    ]
    model = randomized(keras.Sequential([keras.Input((3,)), *parts]))
    return model, ["statistics", "no_scale", "gamma_too"], {*kinds} - {"free"}


@pytest.mark.parametrize("in_place", [False, True])
def test_frozen_statistics_become_layers_that_do_not_train(in_place):
    model, warned, frozen = frozen_in_part()
    x, y = np.random.default_rng(0).normal(3.0, 1.0, size=(2, 16, 4))
    x = x[:, :3]
    before, expected = {v.path: array(v) for v in model.variables}, array(model(x))
    in_training = array(keras_bn.from_keras(model)(x, training=True))
    with pytest.warns(UserWarning, match="no longer train in") as told:
        theirs = keras_bn.to_keras(model, in_place=in_place)
    said = str(told[-1].message)
    assert [name for name in norms(theirs) if f"'{name}'" in said] == warned
    assert told[-1].filename == __file__
    assert norms(theirs, KERAS).keys() == frozen | {"free"}
    assert {n for n, la in norms(theirs).items() if not la.trainable} == frozen
    slack = 0 if backend.NAME == "tensorflow" else 1e-5
    np.testing.assert_allclose(array(theirs(x)), expected, rtol=slack, atol=slack)
    value = array(theirs(x, training=True))
    np.testing.assert_allclose(value, in_training, rtol=1e-5, atol=1e-5)
    theirs.compile("sgd", "mse")
    theirs.fit(x, y, verbose=0)
    moved = {
        v.path.split("/")[-2]
        for v in theirs.variables
        if not np.array_equal(array(v), before[v.path])
    }
    assert moved == {"dense", "free"}


def test_a_frozen_layer_alone():
    layer = OURS(freeze_statistics=True, name="alone")
    with pytest.warns(UserWarning, match="train in 'alone'"):
        assert not keras_bn.to_keras(layer).trainable
    assert layer.trainable
    back = keras_bn.from_keras(keras_bn.to_keras(OURS(trainable=False)))
    assert (back.trainable, back.freeze_statistics) == (False, False)


@backend.but_on("jax", "Keras asks to compile again where fewer variables train")
def test_the_optimizer_goes_on_without_what_keras_freezes():
    model = randomized(sequential(OURS))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = np.ones((8, 8)), np.ones((8, 3))
    model.fit(x, y, verbose=0)
    keras_bn.freeze(model)
    with pytest.warns(UserWarning, match="train in 'first'"):
        theirs = keras_bn.to_keras(model)
    gamma = array(theirs.get_layer("first").gamma)
    theirs.fit(x, y, verbose=0)
    assert theirs.optimizer.iterations == 2
    np.testing.assert_array_equal(array(theirs.get_layer("first").gamma), gamma)


@pytest.mark.skipif(not HAS_RENORM, reason="this Keras has no renorm")
def test_renorm_is_carried_both_ways():
    model = randomized(
        keras.Sequential(
            [keras.Input((4,)), KERAS(renorm=True, renorm_clipping={"rmax": 2.0})]
        )
    )
    ours = keras_bn.from_keras(model)
    x, y = np.random.default_rng(0).normal(size=(2, 16, 4))
    for each in model, ours:
        each.compile("sgd", "mse")
        each.train_on_batch(x, y)
    back = keras_bn.to_keras(ours)
    for a, b, c in zip(model.variables, ours.variables, back.variables, strict=True):
        np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(b.numpy(), c.numpy())


@pytest.mark.skipif(HAS_RENORM, reason="this Keras has renorm")
def test_to_keras_without_renorm():
    with pytest.raises(ValueError, match="no equivalent of renorm=True in 'norm'"):
        keras_bn.to_keras(OURS(renorm=True, name="norm"))
    assert type(keras_bn.to_keras(OURS(name="norm"))) is KERAS


def test_a_model_with_lost_statistics_can_be_converted():
    layer = KERAS()
    layer.build((None, 2))
    layer.moving_variance.assign([np.nan, -1.0])
    np.testing.assert_array_equal(
        keras_bn.from_keras(layer).moving_variance.numpy(), [np.nan, -1.0]
    )


def test_bad_arguments():
    with pytest.raises(TypeError, match="Keras layer or model"):
        keras_bn.from_keras("model.keras")
    with pytest.raises(ValueError, match="'norm' is a normalization itself"):
        keras_bn.from_keras(KERAS(name="norm"), in_place=True)
    with pytest.raises(ValueError, match="`compiled=False` goes with a copy"):
        keras_bn.from_keras(sequential(), in_place=True, compiled=False)


@keras.saving.register_keras_serializable("tests")
class More(keras_bn.BatchNormalization):
    """With a weight that no other layer has a place for."""

    def build(self, input_shape):
        super().build(input_shape)
        self.more = self.add_weight(name="more", trainable=False)


class Otherwise(keras_bn.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return inputs


def stack(*parts):
    return keras.Sequential([keras.Input((4,)), *parts])


def logged(folder):
    logger = keras_bn.StatisticsLogger(np.ones((8, 4)), folder / "none" / "a.csv")
    logger.set_model(stack(keras_bn.BatchNormalization(), Otherwise()))
    logger.rows = ["a row"]
    try:
        logger.on_train_begin()
    finally:
        assert logger.rows == ["a row"]


@pytest.mark.parametrize(
    "refused",
    [
        lambda _: keras_bn.to_keras(stack(More(freeze_statistics=True))),
        lambda _: keras_bn.to_keras(stack(More(freeze_statistics=True)).layers[0]),
        lambda _: keras_bn.replace(
            stack(layers.BatchNormalization(), Otherwise()), lambda norm: "a layer"
        ),
        lambda _: keras_bn.adapt(
            stack(layers.BatchNormalization(), keras_bn.BatchNormalization()), prior=-1
        ),
        lambda _: keras_bn.freeze(
            keras.Sequential([keras_bn.BatchNormalization(), Otherwise()]), fuse=True
        ),
        logged,
    ],
)
def test_a_refusal_comes_before_any_warning(refused, tmp_path, recwarn):
    with pytest.raises((ValueError, TypeError, OSError)):
        refused(tmp_path)
    assert not [str(w.message) for w in recwarn if w.category is UserWarning]
