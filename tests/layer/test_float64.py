"""float64 is kept through every option, and what JAX does without it."""

import numpy as np
import pytest
from support import backend
from support.alone import run_alone

import keras_bn

GROUP, CHANNELS = 3, 4


def groups(x, size):
    """The ghost batches of a batch: the last takes the remainder."""
    count = max(len(x) // size, 1)
    cuts = [size * i for i in range(1, count)]
    return np.split(x, cuts)


def moved(x, momentum, unbiased, debias):
    """Moving mean and variance after the groups, one after the other."""
    mean, variance = np.zeros(CHANNELS), np.ones(CHANNELS)
    for t, part in enumerate(x, start=1):
        share = 1 / t if momentum is None else 1 - momentum
        if debias and momentum is not None:
            share /= 1 - momentum**t
        mean = mean + share * (part.mean(0) - mean)
        variance = variance + share * (part.var(0, ddof=int(unbiased)) - variance)
    return mean, variance


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "unbiased": True},
        {"momentum": 0.9, "debias": True},
        {"momentum": None},
    ],
    ids=str,
)
def test_no_digit_is_lost(options, grouped):
    # Keras's ops `maximum`, `minimum` and `cumsum` give float32 on PyTorch.
    x = np.random.default_rng(0).normal(1e3, 1.0, (11, CHANNELS))
    size = GROUP if grouped else None
    layer = keras_bn.BatchNormalization(
        dtype="float64", virtual_batch_size=size, **options
    )
    parts = groups(x, GROUP) if grouped else [x]
    y = backend.array(layer(x, training=True))
    want = [(p - p.mean(0)) / np.sqrt(p.var(0) + layer.epsilon) for p in parts]
    np.testing.assert_allclose(y, np.concatenate(want), rtol=1e-10, atol=1e-10)
    how = {"unbiased": False, "debias": False, **options}
    mean, variance = moved(parts, **how)
    np.testing.assert_allclose(backend.array(layer.moving_mean), mean, rtol=1e-13)
    np.testing.assert_allclose(
        backend.array(layer.moving_variance), variance, rtol=1e-10
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_renormalization_loses_none_either(grouped):
    x = np.random.default_rng(0).normal(1e3, 1.0, (12, CHANNELS))
    layer = keras_bn.BatchNormalization(
        dtype="float64",
        renorm=True,
        renorm_clipping={"rmax": 1.5, "rmin": 0.1, "dmax": 2.0},
        axis=[1, 2] if grouped else -1,
    )
    x = x.reshape(12, 2, 2) if grouped else x
    y = backend.array(layer(x, training=True))
    stddev = np.sqrt(x.var(0) + layer.epsilon)
    # The initial statistics are 0 and 1.
    r, d = np.clip(stddev, 0.1, 1.5), np.clip(x.mean(0), -2.0, 2.0)
    want = (x - x.mean(0)) / stddev * r + d
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-10)


@backend.only("jax", "elsewhere there is float64 at all times")
def test_without_float64_jax_computes_as_in_float32():
    assert run_alone("jax_without_x64.py")[-1] == "all hold"
