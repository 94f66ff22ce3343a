"""Every case that is defined here and not in Keras, run on both layers.

A row passes where ours holds and Keras's does not; the comparison stands as a table at
the end of the test run. A row on which Keras's layer holds too is out of date: then
Keras has mended it, and the row and the documentation have to go.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from support import backend
from support.backend import array, tensor
from support.marks import mostly_slow

import keras_bn

X = np.random.default_rng(0).normal(3, 2, (8, 5, 3)).astype("float32")


def statistics(layer):
    return layer.moving_mean.numpy(), layer.moving_variance.numpy()


def assert_kept(layer, before):
    for was, now in zip(before, statistics(layer), strict=True):
        np.testing.assert_array_equal(now, was)


def started(cls, **arguments):
    """A layer that has seen one good batch, and its statistics."""
    layer = cls(**arguments)
    layer(X, training=True)
    return layer, statistics(layer)


def mask_on_another_axis(cls):
    layer = cls(axis=1, momentum=0.0)
    mask = np.random.default_rng(1).random((8, 3)) < 0.5
    layer(X, training=True, mask=tensor(mask))
    np.testing.assert_allclose(
        layer.moving_mean.numpy(), np.moveaxis(X, 1, -1)[mask].mean(0), rtol=1e-5
    )


def masked_nan(cls):
    layer = cls(momentum=0.0)
    x, mask = X.copy(), np.ones((8, 5), bool)
    x[:, 4], mask[:, 4] = np.nan, False

    def loss(inputs):
        y = layer(inputs, training=True, mask=tensor(mask))
        return keras.ops.sum(keras.ops.where(mask[..., None], y, 0) ** 3)

    layer.build(x.shape)
    step = backend.training_step(loss, layer.variables, "eager")
    _, (dx, *_) = step(tensor(x), tensor(1.0, "float32"))
    assert np.isfinite(array(dx)[:, :4]).all()
    np.testing.assert_allclose(layer.moving_mean, X[:, :4].mean((0, 1)), rtol=1e-5)


def empty_batch(cls):
    layer, before = started(cls)
    assert layer(X[:0], training=True).shape == (0, 5, 3)
    assert_kept(layer, before)


def fully_masked_batch(cls):
    layer, before = started(cls)
    layer(X, training=True, mask=tensor(np.zeros((8, 5), bool)))
    assert_kept(layer, before)


def one_nan(cls):
    layer, before = started(cls)
    x = X.copy()
    x[0, 0, 1] = np.nan
    y = array(layer(x, training=True))
    assert np.isnan(y[..., 1]).any()
    for was, now in zip(before, statistics(layer), strict=True):
        assert now[1] == was[1]
        assert np.isfinite(now).all()
        assert (now[[0, 2]] != was[[0, 2]]).all()


def float16_overflow(cls):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(8, dtype="mixed_float16"),
            cls(dtype="mixed_float16"),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))
    model.compile(optimizer, "mse")
    x = X[:, 0]
    overflow = np.full_like(x, 6e4)
    for batch in (x, overflow, x):
        model.train_on_batch(batch, x[:, :1])
    assert np.isfinite(model.predict(x, verbose=0)).all()


def float16_statistics(cls):
    layer = cls(dtype="float16", momentum=0.999)
    layer.build((None, 1))
    layer.moving_mean.assign([0.8])
    layer(np.ones((4, 1)) * 1.2, training=True)
    expected = 0.8 * 0.999 + 1.2 * 0.001
    np.testing.assert_allclose(layer.moving_mean.numpy(), [expected], rtol=1e-5)


def training_as_a_tensor(cls):
    layer = cls()
    layer.build((None, 5, 3))

    def run(x, training):
        return layer(x, training=training)

    run = backend.in_mode(run, backend.COMPILED, layer.variables)
    run(tensor(X), tensor(False))
    assert (layer.moving_mean.numpy() == 0).all()
    run(tensor(X), tensor(True))
    assert (layer.moving_mean.numpy() != 0).all()


def several_axes(cls):
    layer = cls(axis=[1, 2], momentum=0.0)
    layer(X, training=True)
    np.testing.assert_allclose(layer.moving_mean.numpy(), X.mean(0), rtol=1e-5)


def keras_2_configuration(cls):
    config = {**cls().get_config(), "axis": [3]}
    layer = cls.from_config(config)
    assert layer(np.ones((2, 3, 3, 4), "float32")).shape == (2, 3, 3, 4)


def constant_column_under_xla(cls):
    layer = cls()
    layer.build((None, 1))
    mode = backend.MODES[-1]
    run = backend.in_mode(lambda x: layer(x, training=True), mode, layer.variables)
    assert np.abs(array(run(tensor(np.full((96, 1), 1e8, "float32"))))).max() < 1e-3


def integers(cls):
    x = np.array([[70000], [70002]], "int32")
    y = array(cls(dtype="mixed_float16")(x, training=True))
    np.testing.assert_allclose(y, [[-0.9995], [0.9995]], atol=1e-3)


def second_derivatives(cls):
    layer = cls(dtype="float64")
    x = tensor(X[:, 0].astype("float64"))
    layer.build(x.shape)
    values = [v.value for v in layer.trainable_variables]
    weights = tensor(np.random.default_rng(2).normal(size=(2, *x.shape)))

    def square(x):
        y = backend.call(layer, values, x)
        return keras.ops.sum(weights[0] * keras.ops.square(y)) / 2

    def penalty(x):
        one = tensor(1.0, "float64")
        _, (gradient,) = backend.vjp(square, [x], one, again=True)
        return keras.ops.sum(weights[1] * gradient)

    _, (second,) = backend.vjp(penalty, [x], tensor(1.0, "float64"))
    step = 1e-6 * weights[0]
    difference = array(penalty(x + step) - penalty(x - step)) / 2
    np.testing.assert_allclose(
        np.sum(array(second) * array(step)), difference, rtol=1e-6
    )


def refuses(**arguments):
    def check(cls):
        with pytest.raises(ValueError, match="Received"):
            cls(**arguments)

    return check


def refuses_at_build(shape, **arguments):
    def check(cls):
        with pytest.raises(ValueError, match="Received: axis="):
            cls(**arguments).build(shape)

    return check


AMONG_REPLICAS = ("large_mean", "masked", "unsynchronized")


@functools.cache
def verdicts_among_replicas(which):
    """What tests/support/replicas.py finds, in a process with two logical devices."""
    script = Path(__file__).parents[1] / "support" / "replicas.py"
    result = subprocess.run(
        [sys.executable, script, which, *AMONG_REPLICAS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return json.loads(result.stdout.splitlines()[-1])


def among_replicas(name):
    """One of the checks of tests/support/replicas.py."""

    def check(cls):
        which = "ours" if cls is keras_bn.BatchNormalization else "keras"
        verdict = verdicts_among_replicas(which)[name]
        assert verdict["holds"], verdict["why"]

    return check


ROWS = {
    "mask with the channels on another axis": mask_on_another_axis,
    "NaN under a mask": masked_nan,
    "empty batch": empty_batch,
    "fully masked batch": fully_masked_batch,
    "a NaN in one channel": one_nan,
    "mixed_float16, an overflowing step": float16_overflow,
    "dtype float16, small steps": float16_statistics,
    "training as a tensor": training_as_a_tensor,
    "axis=[1, 2]": several_axes,
    "a Keras 2 configuration, axis: [3]": keras_2_configuration,
    "XLA, a constant column of 1e8": constant_column_under_xla,
    "integer input, 70000 and 70002": integers,
    "second derivatives": second_derivatives,
    "momentum=1.5": refuses(momentum=1.5),
    "epsilon=-1": refuses(epsilon=-1),
    "axis out of range": refuses_at_build((2, 3), axis=5),
    "repeated axes": refuses(axis=[1, 1]),
    "unknown channel count": refuses_at_build((2, None), axis=1),
}


# Replicas of TensorFlow's; tests/distributed has those of the other backends.
REPLICAS = {
    "synchronized at mean 1e4, std 1": among_replicas("large_mean"),
    "synchronized with a mask": among_replicas("masked"),
    "replicas without synchronization": among_replicas("unsynchronized"),
}
ALONE = list(ROWS)
if backend.NAME == "tensorflow":
    ROWS |= REPLICAS

# What Keras's layer does right on the backends where it is at its best.
KERAS_HOLDS = {
    "tensorflow": set(),
    "torch": {"training as a tensor", "XLA, a constant column of 1e8"},
    "jax": {"integer input, 70000 and 70002"},
}[backend.NAME]
if tuple(map(int, keras.__version__.split(".")[:2])) > (3, 15):
    KERAS_HOLDS |= {"momentum=1.5"}


def outcome(check, cls):
    """How a layer fares: "holds", or what went wrong, in a few words."""
    try:
        check(cls)
    except (Exception, pytest.fail.Exception) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:60]
    return "holds"


@pytest.mark.parametrize("row", mostly_slow(ROWS, ALONE))
def test_ours_holds_where_keras_does_not(row, record_property):
    theirs = outcome(ROWS[row], keras.layers.BatchNormalization)
    ours = outcome(ROWS[row], keras_bn.BatchNormalization)
    record_property("comparison", (row, theirs, ours))
    assert ours == "holds"
    assert (theirs == "holds") == (row in KERAS_HOLDS)
