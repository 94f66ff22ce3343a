"""Options that are set on a built layer: they take effect, or are refused in words."""

import re
import time

import keras
import numpy as np
import pytest
from support.backend import NAME, array

import keras_bn
from keras_bn.layer import arguments

OURS = keras_bn.BatchNormalization


def name_of(value):
    """A name for a case, the same in every process: no address in it."""
    return re.sub(r"<(?:\w+\.)*(\w+) object at 0x\w+>", r"\1", str(value))


def model_of(**options):
    """A compiled model around one normalization."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), OURS(name="bn", **options), keras.layers.Dense(1)]
    )
    # On PyTorch there is nothing to compile.
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, model.get_layer("bn")


def data():
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (16, 4)).astype("float32"), rng.normal(size=(16, 1))


def fit(model):
    x, y = data()
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)


RENORM = {"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.5}}
PLAIN_MEAN = {"momentum": None}


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({}, "momentum", 0.5),
        ({}, "epsilon", 0.3),
        ({}, "axis", 1),
        ({}, "unbiased", True),
        ({}, "virtual_batch_size", 4),
        ({}, "synchronized", True),
        ({}, "freeze_statistics", True),
        ({}, "gamma_regularizer", keras.regularizers.L2(0.5)),
        ({}, "beta_constraint", keras.constraints.NonNeg()),
        ({"debias": True}, "momentum", 0.5),
        (PLAIN_MEAN, "unbiased", True),
        (RENORM, "renorm_clipping", {"rmax": 1.1, "dmax": 0.1}),
        (RENORM, "renorm_momentum", 0.5),
    ],
    ids=name_of,
)
def test_it_takes_effect_in_the_next_fit(options, name, value, tmp_path):
    model, layer = model_of(**options)
    fit(model)
    other, _ = model_of(**{**options, name: value})
    other.set_weights(model.get_weights())
    setattr(layer, name, value)
    fit(model)
    fit(other)
    for ours, theirs in zip(model.weights, other.weights, strict=True):
        np.testing.assert_allclose(array(ours), array(theirs), rtol=1e-6, atol=1e-7)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("bn").get_config() == layer.get_config()


def test_it_takes_effect_in_a_model_around_the_model():
    inner, layer = model_of()
    outer = keras.Sequential([keras.Input((4,)), inner])
    outer.compile("sgd", "mse")
    fit(outer)
    mean = array(layer.moving_mean)
    layer.momentum = 1.0
    fit(outer)
    np.testing.assert_array_equal(array(layer.moving_mean), mean)


def test_evaluate_and_predict_heed_it():
    model, layer = model_of()
    x, y = data()
    model.evaluate(x, y, verbose=0)
    before = model.predict(x, verbose=0)
    layer.epsilon = 3.0
    other, _ = model_of(epsilon=3.0)
    expected = other.predict(x, verbose=0)
    assert not np.allclose(before, expected)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-6)
    loss = other.evaluate(x, y, verbose=0)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(loss, rel=1e-6)


RAMP = keras_bn.renorm_ramp()


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({}, "momentum", None),
        ({}, "debias", True),
        ({}, "renorm", True),
        ({}, "center", False),
        ({}, "scale", False),
        ({}, "axis", 1),
        ({}, "axis", [1, 2]),
        (PLAIN_MEAN, "momentum", 0.9),
        ({"debias": True}, "debias", False),
        ({"center": False}, "center", True),
        (RENORM, "renorm", False),
        (RENORM, "renorm_clipping", RAMP),
        ({"renorm": True, "renorm_clipping": RAMP}, "renorm_clipping", {}),
    ],
    ids=name_of,
)
def test_what_needs_other_weights_is_refused_and_nothing_changes(options, name, value):
    layer = OURS(name="bn", **options)
    layer.build((None, 3, 4))
    config = layer.get_config()
    with pytest.raises(ValueError, match=f"`{name}` cannot be set to .* layer 'bn'"):
        setattr(layer, name, value)
    assert layer.get_config() == config
    before = OURS(name="bn", **options)
    setattr(before, name, value)
    before.build((None, 3, 4))


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize(
    ("options", "name", "value", "message"),
    [
        ({}, "momentum", 1.5, "`momentum` must be between 0 and 1"),
        ({}, "epsilon", -1.0, "`epsilon` must be a finite number"),
        ({}, "axis", "channels", "`axis` must be an int"),
        ({}, "virtual_batch_size", 0, "`virtual_batch_size` must be a positive"),
        ({}, "freeze_affine", "alpha", "`freeze_affine` must be"),
        ({"synchronized": True}, "virtual_batch_size", 4, "exclude each other"),
        ({"virtual_batch_size": 4}, "synchronized", True, "exclude each other"),
        (RENORM, "renorm_clipping", {"rmin": 2.0}, None),
        (RENORM, "renorm_clipping", {"max": 2.0}, "invalid keys"),
        (RENORM, "renorm_momentum", -0.1, "`renorm_momentum` must be between"),
    ],
    ids=name_of,
)
def test_what_the_constructor_refuses_is_refused_later(
    options, name, value, message, built
):
    layer = OURS(**options)
    if built:
        layer.build((None, 4))
    if message is None:
        setattr(layer, name, value)
        return
    config = layer.get_config()
    with pytest.raises(ValueError, match=message):
        setattr(layer, name, value)
    assert layer.get_config() == config


def test_the_options_are_the_arguments():
    import inspect

    names = inspect.signature(OURS).parameters
    assert arguments.OPTIONS.keys() == names.keys() - {"kwargs"}


def test_setting_options_searches_nothing():
    """As many as DenseNet121 has layers, in at most a tenth of a second."""
    x = keras.Input((4,))
    y = x
    for _ in range(121):
        y = OURS()(y)
    model = keras.Model(x, y)
    model.compile("sgd", "mse")
    if NAME != "jax":  # it compiles for long
        model.predict(np.zeros((8, 4)), verbose=0)
    start = time.process_time()
    for layer in model.layers[1:]:
        layer.freeze_statistics = True
    assert time.process_time() - start < 0.1
