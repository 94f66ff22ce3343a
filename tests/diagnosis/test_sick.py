"""Each kind of finding is found on models made sick in three ways of their own.

None of these is what the tests of its threshold use.
"""

import keras
import numpy as np
import pytest
from keras import layers

import keras_bn
from keras_bn.diagnosis.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore:The statistics of")
BN, KERAS = keras_bn.BatchNormalization, layers.BatchNormalization
RNG = np.random.default_rng(1)
IMAGES = RNG.gamma(2.0, 1.5, (128, 6, 6, 3)).astype("float32")
TABLE = (RNG.normal(size=(256, 5)) * 3 + 1).astype("float32")


def convnet(bn=KERAS, bias=False, **options):
    keras.utils.set_random_seed(1)
    image = keras.Input((6, 6, 3))
    h = layers.Conv2D(8, 3, use_bias=bias, name="conv")(image)
    h = bn(name="bn", **options)(h)
    h = layers.ReLU()(h)
    h = layers.GlobalAveragePooling2D()(h)
    return keras.Model(image, layers.Dense(3)(h), name="net")


def dense(bn=BN, bias=False, **options):
    keras.utils.set_random_seed(1)
    made = [keras.Input((5,)), layers.Dense(12, use_bias=bias, name="dense")]
    made += [bn(name="bn", **options), layers.Dense(2, name="head")]
    return keras.Sequential(made, name="net")


def well(model, x):
    how = {"include_frozen": True, "batch_size": len(x), "verbose": 0}
    keras_bn.recalibrate(model, x, **how)
    return model


def changed(model, name, change):
    variable = getattr(model.get_layer("bn"), name)
    variable.assign(change(keras.ops.convert_to_numpy(variable)))
    return model


def trained(model, x, steps, rate=0.01, batch=32):
    model.compile(keras.optimizers.SGD(rate), "mse")
    y = np.zeros((steps * batch, model.output_shape[-1]))
    model.fit(x[: steps * batch], y, batch_size=batch, verbose=0)
    return model


def only_head(model):
    """Trained with the normalization called in inference mode only."""
    for _ in range(3):
        model(TABLE, training=False)
    return model


def weights_copied(model, x):
    """The weights of a trained model, without its statistics."""
    source, target = model.get_layer("bn"), dense()
    for first, second in zip(source.trainable_variables, [0, 1], strict=True):
        target.get_layer("bn").trainable_variables[second].assign(first)
    return target, x


def kernel(model, name, change):
    layer = model.get_layer(name)
    layer.kernel.assign(change(keras.ops.convert_to_numpy(layer.kernel).copy()))
    return model


def dying(model, channels):
    def change(weights):
        weights[..., channels] = 0
        return weights

    return kernel(model, "conv", change)


def zero(array, channels=slice(None)):
    array = array.copy()
    array[channels] = 0.0
    return array


class Fixed(layers.Layer):
    """Calls what it holds in inference mode."""

    def __init__(self):
        super().__init__(name="fixed")
        self.bn = BN(name="bn")

    def build(self, shape):
        self.bn.build(shape)

    def call(self, x):
        return self.bn(x, training=False)


def held_still():
    image = keras.Input((5,))
    return keras.Model(image, layers.Dense(2)(Fixed()(image)), name="net")


SICK = {
    "never-updated": [
        lambda: (only_head(dense()), TABLE),
        lambda: weights_copied(well(dense(), TABLE), TABLE),
        lambda: (convnet(BN, debias=True), IMAGES),
    ],
    "non-finite-statistics": [
        lambda: (trained(dense(KERAS), TABLE * np.float32(np.inf), 2), TABLE),
        lambda: (
            changed(well(convnet(), IMAGES), "moving_variance", lambda v: v * np.nan),
            IMAGES,
        ),
        lambda: (
            changed(well(dense(KERAS), TABLE), "moving_mean", lambda m: m - np.inf),
            TABLE,
        ),
    ],
    "negative-variance": [
        lambda: (changed(well(dense(), TABLE), "moving_variance", np.negative), TABLE),
        lambda: (
            changed(well(convnet(), IMAGES), "moving_variance", lambda v: v - v.max()),
            IMAGES,
        ),
        lambda: (
            changed(
                well(dense(KERAS), TABLE), "moving_variance", lambda v: v * 0 - 1e-9
            ),
            TABLE,
        ),
    ],
    "momentum-too-slow": [
        lambda: (trained(dense(), TABLE + 8, 6), TABLE + 8),
        lambda: (trained(convnet(momentum=0.995), IMAGES * 20, 4), IMAGES * 20),
        lambda: (trained(dense(KERAS, momentum=0.9), TABLE * 30, 3), TABLE * 30),
    ],
    "stale-statistics": [
        lambda: (
            kernel(well(dense(), TABLE), "dense", lambda w: -2 * w),
            TABLE,
        ),
        lambda: (well(convnet(), IMAGES), np.sqrt(IMAGES) / 4),
        lambda: (
            changed(well(dense(KERAS), TABLE), "moving_variance", lambda v: v * 9),
            TABLE,
        ),
    ],
    "dead-channel": [
        lambda: (well(dying(convnet(), [0]), IMAGES), IMAGES),
        lambda: (well(dense(), TABLE * 1e-6), TABLE * 1e-6),
        lambda: (well(dying(convnet(BN), slice(0, 6)), IMAGES), IMAGES),
    ],
    "small-gamma": [
        lambda: (changed(well(dense(), TABLE), "gamma", lambda g: g * -5e-4), TABLE),
        lambda: (
            changed(well(convnet(), IMAGES), "gamma", lambda g: zero(g, [1, 5])),
            IMAGES,
        ),
        lambda: (well(dense(KERAS, gamma_initializer="zeros"), TABLE), TABLE),
    ],
    "frozen": [
        lambda: (keras_bn.freeze(model := well(dense(), TABLE)) and model, TABLE),
        lambda: (held_still(), TABLE),
        lambda: (
            setattr(model := well(convnet(), IMAGES), "trainable", False) or model,
            IMAGES,
        ),
    ],
    "small-batch": [
        lambda: (well(dense(), TABLE), (TABLE[:64], {"batch_size": 2})),
        lambda: (
            well(dense(virtual_batch_size=8), TABLE),
            (TABLE, {"batch_size": 64}),
        ),
        lambda: (well(dense(KERAS), TABLE), (TABLE, {"batch_size": 15})),
    ],
    "redundant-bias": [
        lambda: (well(convnet(bias=True), IMAGES), IMAGES),
        lambda: (well(dense(bias=True), TABLE), TABLE),
        lambda: (well(two_in_a_row(), TABLE), TABLE),
    ],
    "train-inference-gap": [
        lambda: (
            changed(well(dense(), TABLE), "moving_variance", lambda v: v * 0.01),
            TABLE,
        ),
        lambda: (well(convnet(), IMAGES), IMAGES * 5 - 20),
        lambda: (
            changed(well(dense(KERAS), TABLE), "moving_mean", lambda m: m + 20),
            TABLE,
        ),
    ],
    "large-mean": [
        lambda: (well(plain(), TABLE + 2000), TABLE + 2000),
        lambda: (well(plain(KERAS), years()), years()),
        lambda: (well(biased(), TABLE), TABLE),
    ],
    "non-finite-data": [
        lambda: (well(dense(), TABLE), holed(TABLE, np.nan)),
        lambda: (well(convnet(), IMAGES), holed(IMAGES, np.inf)),
        lambda: (well(dense(KERAS), TABLE), holed(TABLE, -np.inf)),
    ],
    "non-finite-parameters": [
        lambda: (changed(well(dense(), TABLE), "gamma", lambda v: v * np.nan), TABLE),
        lambda: (
            changed(well(convnet(), IMAGES), "beta", lambda v: v + np.inf),
            IMAGES,
        ),
        lambda: (
            changed(well(dense(KERAS), TABLE), "beta", lambda v: v - np.inf),
            TABLE,
        ),
    ],
    "follows-inputs": [
        lambda: (well(dense(adapt_prior=0), TABLE), TABLE),
        lambda: (adapting(well(convnet(BN), IMAGES), prior=16), IMAGES),
        lambda: (adapting(well(dense(), TABLE), memory=0.5), TABLE),
    ],
}


def holed(x, value):
    """The data with one value that is not finite."""
    x = x.copy()
    x[3].flat[1] = value
    return x


def adapting(model, **options):
    keras_bn.adapt(model, **options)
    return model


def two_in_a_row():
    made = [keras.Input((5,)), layers.Dense(4, use_bias=False), BN(name="bn_0")]
    made += [layers.Dense(3, name="dense"), KERAS(name="bn")]
    return keras.Sequential(made, name="net")


def plain(bn=BN):
    return keras.Sequential([keras.Input((5,)), bn(name="bn")], name="net")


def years():
    """A table with a column of years."""
    x = TABLE.copy()
    x[:, 2] = 2000 + np.arange(256) % 20
    return x


def biased():
    """Weights that have run off: a bias of a thousand."""
    model = dense(bias=True)
    model.get_layer("dense").bias.assign(np.full(12, 1e4))
    return model


@pytest.mark.parametrize(
    "way", [0, *(pytest.param(way, marks=pytest.mark.slow) for way in (1, 2))]
)
@pytest.mark.parametrize("kind", SICK)
def test_is_found(kind, way):
    model, data = SICK[kind][way]()
    data, options = data if isinstance(data, tuple) else (data, {})
    report = keras_bn.diagnose(model, data, **options)
    assert kind in [finding.kind for finding in report.findings]


def test_every_kind_is_here_in_three_ways():
    assert set(SICK) == set(RULES)
    assert {len(ways) for ways in SICK.values()} == {3}
