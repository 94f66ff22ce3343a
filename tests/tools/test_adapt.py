"""adapt: inference pools its statistics with those of the batch, as arithmetic says."""

import pickle

import keras
import numpy as np
import pytest
from keras import layers
from support import backend
from support.backend import array
from support.zoo import convolutional, inputs_of, nested, randomized, sequential

import keras_bn
from keras_bn.backends import modes
from keras_bn.surgery.graph import walk

EPSILON = 1e-3
# Large enough for the kernels that have an op of the backend.
IMAGES = (32, 32, 8)


def pooled(x, weight, mean, variance, share):
    """Mean and variance per last axis, of elements with weight 0 or 1."""
    x, weight = x.astype(float), np.broadcast_to(weight, x.shape).astype(float)
    axes = tuple(range(x.ndim - 1))
    count = weight.sum(axes)
    m = np.where(weight > 0, x, 0).sum(axes) / np.maximum(count, 1)
    v = np.where(weight > 0, (x - m) ** 2, 0).sum(axes) / np.maximum(count, 1)
    a = np.where((count > 0) & np.isfinite(v), share, 0.0)
    m, v = np.where(a > 0, m, 0.0), np.where(a > 0, v, 0.0)
    distance = m - mean
    return (
        mean + a * distance,
        (1 - a) * variance + a * v + a * (1 - a) * distance**2,
    )


def layer_for(shape, **options):
    layer = keras_bn.BatchNormalization(name="norm", epsilon=EPSILON, **options)
    model = keras.Sequential([keras.Input(shape), layer])
    randomized(model)
    return model, model.layers[0]


def values(layer):
    names = ("moving_mean", "moving_variance", "gamma", "beta")
    return [array(getattr(layer, name)) for name in names]


def normalized(x, mean, variance, gamma, beta):
    return gamma * (x - mean) / np.sqrt(variance + EPSILON) + beta


def data(shape, mean=3.0, n=40):
    return np.random.default_rng(0).normal(mean, 2.0, (n, *shape)).astype("float32")


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("prior", [0, 3.5, 16])
@pytest.mark.parametrize(
    ("shape", "center"),
    [((5,), 3), ((7, 5), 3), ((6, 6, 5), 3), (IMAGES, 3), (IMAGES, 3e4)],
)
def test_the_numbers(shape, center, prior, xla):
    model, layer = layer_for(shape)
    mean, variance, *affine = values(layer)
    x = data(shape, center)
    assert keras_bn.adapt(model, prior=prior) == ["norm"]
    if backend.NAME != "torch":
        model.compile(jit_compile=xla)
    expected = pooled(x, 1, mean, variance, len(x) / (len(x) + prior))
    y = normalized(x, *expected, *affine)
    # What rounding of the input itself costs, at a large mean.
    error = {"rtol": 1e-4, "atol": max(1e-4, center * 1e-7)}
    np.testing.assert_allclose(array(model(x)), y, **error)
    predicted = model.predict(x, batch_size=len(x), verbose=0)
    np.testing.assert_allclose(predicted, y, **error)
    for before, after in zip((mean, variance), values(layer), strict=False):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("center", [3, 1e4])
def test_gradients_take_the_statistics_as_constants(center):
    layer = keras_bn.BatchNormalization(adapt_prior=40, epsilon=EPSILON)
    layer.build((None, *IMAGES))
    randomized(keras.Sequential([keras.Input(IMAGES), layer]))
    mean, variance, gamma, _ = values(layer)
    x, upstream = data(IMAGES, center), data(IMAGES, 0.0)
    mean, variance = pooled(x, 1, mean, variance, 0.5)
    run = modes.with_gradients(layer, layer.variables, modes.USUAL)
    _, (dx, d_gamma, d_beta) = run(x, upstream)
    scale = 1 / np.sqrt(variance + EPSILON)
    standard = upstream * (x - mean) * scale
    for got, wanted in (
        (dx, upstream * gamma * scale),
        (d_gamma, standard.sum((0, 1, 2))),
        (d_beta, upstream.sum((0, 1, 2), "float64")),
    ):
        np.testing.assert_allclose(array(got), wanted, rtol=2e-3, atol=1e-2)


def test_an_empty_batch_of_images():
    _, layer = layer_for(IMAGES, adapt_prior=4)
    assert layer(np.zeros((0, *IMAGES), "float32")).shape == (0, *IMAGES)


def test_a_mask_and_lost_batches():
    _, layer = layer_for((7, 5), adapt_prior=4)
    mean, variance, *affine = values(layer)
    x = data((7, 5))
    mask = np.random.default_rng(1).random((40, 7)) > 0.4
    x[~mask] = np.nan
    expected = pooled(x, mask[..., None], mean, variance, 40 / 44)
    y = array(layer(x, mask=mask))
    np.testing.assert_allclose(
        y[mask], normalized(x, *expected, *affine)[mask], rtol=1e-4, atol=1e-4
    )
    # What has no statistics leaves the moving ones: channel by channel.
    nothing = array(layer(np.zeros((3, 7, 5), "float32"), mask=np.zeros((3, 7), bool)))
    zeros = normalized(np.zeros((3, 7, 5)), mean, variance, *affine)
    np.testing.assert_allclose(nothing, zeros, rtol=1e-5, atol=1e-5)
    assert layer(np.zeros((0, 7, 5), "float32")).shape == (0, 7, 5)
    x = data((7, 5))
    x[3, 2, 1] = np.inf
    lost = array(layer(x))
    expected = pooled(data((7, 5)), 1, mean, variance, 40 / 44)
    kept = np.delete(normalized(x, *expected, *affine), 1, -1)
    np.testing.assert_allclose(np.delete(lost, 1, -1), kept, rtol=1e-4, atol=1e-4)
    clean = normalized(x, mean, variance, *affine)[..., 1]
    fine = np.isfinite(clean)
    np.testing.assert_allclose(lost[..., 1][fine], clean[fine], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
def test_a_memory_follows_the_batches(memory, tmp_path):
    model, layer = layer_for((5,))
    mean, variance, *affine = values(layer)
    model.predict(data((5,)), verbose=0)  # traced before
    keras_bn.adapt(model, memory=memory)
    new = model.layers[0]
    assert [w.name for w in new.weights][-2:] == ["adapted_mean", "adapted_variance"]
    for step in range(3):
        x = data((5,), mean=step)
        mean, variance = pooled(x, 1, mean, variance, 1 - memory)
        y = normalized(x, mean, variance, *affine)
        predicted = model.predict(x, batch_size=len(x), verbose=0)
        np.testing.assert_allclose(predicted, y, rtol=1e-4, atol=1e-4)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").layers[0]
    np.testing.assert_allclose(array(loaded.adapted_mean), mean, rtol=1e-5, atol=1e-5)
    start = values(new)
    assert keras_bn.unadapt(model) == ["norm"]
    assert len(model.layers[0].weights) == 4
    x = data((5,))
    y = normalized(x, *start)
    np.testing.assert_allclose(model.predict(x, verbose=0), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [sequential, convolutional, nested])
@pytest.mark.parametrize("options", [{"prior": 2}, {"memory": 0.8}])
def test_there_and_back(make, options):
    model = randomized(make(keras_bn.BatchNormalization))
    x = inputs_of(model, 8)
    before = model.predict(x, verbose=0)
    paths = keras_bn.adapt(model, **options)
    assert len(paths) == len(set(paths)) > 0
    after = model.predict(x, verbose=0)
    assert np.abs(after - before).max() > 1e-2
    assert keras_bn.unadapt(model) == paths
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)


def test_training_does_not_change():
    x = data((5,))
    model, layer = layer_for((5,))
    adapted = keras_bn.from_keras(model)
    keras_bn.adapt(adapted)
    for training in (True, keras.ops.convert_to_tensor(True)):
        a = array(layer(x, training=training))
        b = array(adapted.layers[0](x, training=training))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(model.weights, adapted.weights, strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-6, atol=1e-6)
    # Frozen statistics are the moving ones, in training.
    layer.freeze_statistics = True
    frozen = array(layer(x, training=True))
    layer.adapt_prior = 1
    np.testing.assert_array_equal(array(layer(x, training=True)), frozen)
    assert np.abs(array(layer(x)) - frozen).max() > 0.1


def test_it_is_saved_and_copied(tmp_path):
    model, _ = layer_for((5,))
    keras_bn.adapt(model, prior=3)
    x = data((5,))
    y = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    for copy in (
        keras.saving.load_model(tmp_path / "model.keras"),
        keras_bn.load_model(tmp_path / "model.keras"),
        keras_bn.from_keras(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert copy.layers[0].adapt_prior == 3
        np.testing.assert_array_equal(copy.predict(x, verbose=0), y)


@pytest.mark.skipif(backend.NAME != "tensorflow", reason="SavedModels are its own")
def test_a_saved_model_adapts(tmp_path):
    import tensorflow as tf

    model, _ = layer_for((5,))
    keras_bn.adapt(model, prior=3)
    x = data((5,))
    model.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "exported")
    served = loaded.serve(x)
    np.testing.assert_allclose(array(served), array(model(x)), rtol=1e-5, atol=1e-5)


def test_half_precision():
    layer = keras_bn.BatchNormalization(adapt_prior=0, dtype="mixed_float16")
    x = data((6, 6, 5), mean=100.0)
    y = array(layer(x.astype("float16")))
    assert np.abs(y.mean((0, 1, 2))).max() < 0.1
    assert np.abs(y.std((0, 1, 2)) - 1).max() < 0.1


def test_tools_refuse_by_name():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, name="dense"),
            keras_bn.BatchNormalization(name="norm"),
        ]
    )
    keras_bn.adapt(model)
    (fold,) = keras_bn.plan_fold(model)
    assert fold.into is None
    assert "follows its inputs (`keras_bn.adapt`)" in fold.reason
    assert any(layer.name == "norm" for layer in keras_bn.fold(model).layers)
    with pytest.raises(ValueError, match=r"no equivalent of adapt_prior=16\.0"):
        keras_bn.to_keras(model)
    if backend.NAME == "tensorflow":
        with pytest.raises(ValueError, match="'norm' follows its inputs"):
            keras_bn.export_int8(model, "never.tflite", np.zeros((4, 4)))
    keras_bn.unadapt(model)
    assert keras_bn.plan_fold(model)[0].into == "dense"


def test_what_is_refused():
    model, layer = layer_for((5,))
    for options, match in [
        ({"prior": -1}, "`adapt_prior` must be a finite number"),
        ({"prior": np.inf}, "`adapt_prior` must be a finite number"),
        ({"memory": 1.5}, "`adapt_memory` must be between 0 and 1"),
        ({"prior": 1, "memory": 0.5}, "`prior` and `memory` exclude each other"),
    ]:
        with pytest.raises(ValueError, match=match):
            keras_bn.adapt(model, **options)
    assert layer.adapt_prior is None
    assert layer is model.layers[0]
    with pytest.raises(ValueError, match="is a normalization itself"):
        keras_bn.adapt(layer, memory=0.5)
    with pytest.raises(ValueError, match="would need other weights"):
        layer.adapt_memory = 0.5
    with pytest.raises(ValueError, match="no batch normalization of keras_bn to adapt"):
        keras_bn.adapt(sequential())
    default = keras_bn.BatchNormalization().get_config()
    assert not any(name.startswith("adapt") for name in default)
    assert not any("adapt" in n for n, _ in walk(model))


class Maker(keras.Model):
    """Makes its own layers, so that a file of it has none."""

    def __init__(self, units=3, **options):
        inputs = keras.Input((4,))
        outputs = layers.BatchNormalization(name="norm")(layers.Dense(units)(inputs))
        super().__init__(inputs, outputs, **options)
        self.units = units

    def get_config(self):
        return {"units": self.units}


@pytest.mark.filterwarnings("ignore:Maker in .* makes its own layers")
@pytest.mark.parametrize("options", [{"prior": 4}, {"memory": 0.9}])
def test_files_of_classes_that_make_their_own_layers(tmp_path, options):
    model, file = keras_bn.from_keras(Maker()), tmp_path / "model.keras"
    how = {"custom_objects": {"Maker": Maker}}
    if "prior" in options:
        keras_bn.adapt(model, **options)
        model.save(file)
        loaded = keras_bn.load_model(file, **how)
        assert loaded.get_layer("norm").adapt_prior == 4
    else:
        with pytest.warns(UserWarning, match=r"will not load: Maker.* `prior` takes n"):
            keras_bn.adapt(model, **options)
        model.save(file)
        with pytest.raises(ValueError, match="expected 4 variables"):
            keras_bn.load_model(file, **how)
