"""A momentum that follows a schedule of the update count, as PointNet trains."""

import keras
import numpy as np
import pytest
from support import backend
from support.backend import array

import keras_bn


@keras.saving.register_keras_serializable(package="keras_bn_tests")
class PointNet(keras.optimizers.schedules.LearningRateSchedule):
    """The weight of the old value: 1 - 0.5 * 0.5^floor(count / steps), at most 0.99.

    Qi et al., "PointNet", 2017: `get_bn_decay` of its training script.
    """

    def __init__(self, steps=3):
        super().__init__()
        self.steps = steps

    def __call__(self, step):
        periods = keras.ops.floor(keras.ops.cast(step, "float32") / self.steps)
        return keras.ops.minimum(1.0 - 0.5 * keras.ops.power(0.5, periods), 0.99)

    def get_config(self):
        return {"steps": self.steps}


def expected(batches, steps=3, unbiased=False):
    """Mean and variance after each batch, in plain arithmetic."""
    mean, variance = 0.0, 1.0
    for count, x in enumerate(batches):
        momentum = min(1 - 0.5 * 0.5 ** (count // steps), 0.99)
        x = x.astype(float).reshape(-1, x.shape[-1])
        mean = momentum * mean + (1 - momentum) * x.mean(0)
        new = x.var(0, ddof=int(unbiased))
        variance = momentum * variance + (1 - momentum) * new
    return mean, variance


def batches(shape=(16, 4), n=24):
    rng = np.random.default_rng(0)
    return [rng.normal(k, 2.0, shape).astype("float32") for k in range(n)]


def assert_statistics(layer, mean, variance):
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        array(layer.moving_variance), variance, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", [(16, 4), (4, 5, 5, 4)])
def test_eager(shape, unbiased):
    layer = keras_bn.BatchNormalization(momentum=PointNet(), unbiased=unbiased)
    data = batches(shape)
    for x in data:
        layer(x, training=True)
    assert_statistics(layer, *expected(data, unbiased=unbiased))


@pytest.mark.parametrize("xla", [False, True])
def test_in_fit(xla, tmp_path):
    if xla and backend.NAME == "torch":
        pytest.skip("PyTorch has no XLA here")
    layer = keras_bn.BatchNormalization(momentum=PointNet(), name="norm")
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(
        "sgd", "mse", **({} if backend.NAME == "torch" else {"jit_compile": xla})
    )
    data = batches()
    for x in data[:12]:
        model.train_on_batch(x, x)
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(model.layers[0].momentum, PointNet)
    for x in data[12:]:
        model.train_on_batch(x, x)
    assert_statistics(model.layers[0], *expected(data))


def test_a_lost_batch_is_no_update():
    layer = keras_bn.BatchNormalization(momentum=PointNet())
    data = batches()
    for x in data:
        layer(x, training=True)
        layer(x[:0], training=True)
    assert_statistics(layer, *expected(data))


def test_it_is_changed_and_refused():
    layer = keras_bn.BatchNormalization(momentum=PointNet(), name="norm")
    layer.build((None, 4))
    layer.momentum = PointNet(steps=5)
    with pytest.raises(ValueError, match="would need other weights"):
        layer.momentum = 0.9
    plain = keras_bn.BatchNormalization(name="plain")
    plain.build((None, 4))
    with pytest.raises(ValueError, match="would need other weights"):
        plain.momentum = PointNet()
    with pytest.raises(ValueError, match="`debias` needs a momentum"):
        keras_bn.BatchNormalization(momentum=PointNet(), debias=True)
    with pytest.raises(ValueError, match="no equivalent of momentum="):
        keras_bn.to_keras(layer)


def test_a_diagnosis_reads_the_momentum_of_now():
    layer = keras_bn.BatchNormalization(momentum=PointNet(), name="norm")
    model = keras.Sequential([keras.Input((4,)), layer])
    for x in batches()[:4]:
        model(x, training=True)
    report = keras_bn.diagnose(model)
    assert report.layer("norm").momentum == 0.75
