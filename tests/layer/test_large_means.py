"""Large means and constant columns, in every mode, at sizes around powers of two.

XLA computes some values in several places, and rounds them in several ways: what is
subtracted from an input of 1e5 and added to its mean must not be one of these.
"""

import itertools

import numpy as np
import pytest
from support.marks import mostly_slow
from support.steps import MODES, Step, array, oracle_step, relative_error

import keras_bn

CHANNELS = [127, 128, 129, 255, 256, 257, 264, 511, 512, 513]
SIZES = [(8, 70), (64, 30), (560,), (6, 7, 7), (32, 14, 14)]
# XLA adds up thousands of rows in one thread, one after the other: 3e-5. Two roundings
# of one shift gave 4e-3.
NEAR = 5e-5


def draw(shape, mean, deviation=1.0):
    rng = np.random.default_rng(0)
    return rng.normal(mean, deviation, shape), rng.normal(size=shape)


def layer_for(shape, dtype, **arguments):
    layer = keras_bn.BatchNormalization(dtype=dtype, **arguments)
    layer.build(shape)
    return layer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtype", mostly_slow(["float32", "mixed_bfloat16"], ["float32"])
)
@pytest.mark.parametrize("channels", mostly_slow(CHANNELS, [256]))
@pytest.mark.parametrize("sizes", mostly_slow(SIZES, [(8, 70)]))
def test_a_step_of_large_mean_is_the_oracles(sizes, channels, dtype, mode):
    half = dtype == "mixed_bfloat16"
    x, upstream = draw((*sizes, channels), *((1e4, 200) if half else (1e5, 1)))
    x[..., 3] = 1e8
    layer = layer_for(x.shape, dtype, momentum=0.0)
    got = Step(layer, mode)(x, upstream)
    axes = (x.ndim - 1,)
    ones, zeros = np.ones(channels), np.zeros(channels)
    want = oracle_step(layer, x, upstream, axes, ones, zeros)
    np.testing.assert_allclose(got["y"][..., 3], 0, atol=1e-3)
    # Such a channel has no more of a deviation than epsilon, and large gradients.
    others = [c for c in range(channels) if c != 3]
    for name, value in want.items():
        error = relative_error(got[name][..., others], value[..., others])
        assert error < (2**-8 if half else NEAR), name


CONSTANTS = np.array([1e20, -3e18, 1e8 + 8, 0.1, -7.3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", mostly_slow([3, 7, 100], [7]))
def test_constant_columns_give_beta(rows, masked, groups, mode):
    """Also where a mask leaves out the first sample, which is not finite."""
    x, upstream = draw((rows, 6, 7), 3.0)
    x[..., :5] = CONSTANTS
    mask = None
    if masked:
        mask = np.random.default_rng(1).random((rows, 6)) < 0.6
        mask[:, 3], mask[0] = True, False
        x[0] = np.nan
    layer = layer_for(x.shape, "float32", momentum=0.0, virtual_batch_size=groups)
    layer.beta.assign(np.arange(7.0))
    got = Step(layer, mode, mask)(x, upstream)
    counted = np.ones((rows, 6), bool) if mask is None else mask
    y = got["y"][counted][:, :5]
    np.testing.assert_allclose(y, np.broadcast_to(np.arange(5.0), y.shape), atol=1e-3)
    np.testing.assert_allclose(got["moving_mean"][:5], CONSTANTS, rtol=1e-6)
    assert np.isfinite(got["d_gamma"]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", mostly_slow([255, 256, 257, 512], [256]))
@pytest.mark.parametrize("sizes", mostly_slow([(8, 70), (560,), (6, 7, 7)], [(8, 70)]))
def test_a_mask_that_leaves_out_the_first_rows(sizes, channels, mode):
    x, upstream = draw((*sizes, channels), 1e5)
    mask = np.random.default_rng(1).random(sizes) < 0.7
    mask[:2] = False
    x[:2] = 0.0
    layer = layer_for(x.shape, "float32", momentum=0.0)
    got = Step(layer, mode, mask)(x, upstream)
    axes = (x.ndim - 1,)
    ones, zeros = np.ones(channels), np.zeros(channels)
    want = oracle_step(layer, x, upstream, axes, ones, zeros, mask)
    for name, value in want.items():
        keep = mask if value.ndim == x.ndim else ...
        assert relative_error(got[name][keep], value[keep]) < NEAR, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", mostly_slow([3, 4, 20], [3]))
def test_ghost_batches_each_of_its_own_large_mean(size, mode):
    """Groups whose means differ lose nothing to each other."""
    x, upstream = draw((20, 11, 256), 0.0)
    bounds = [*range(0, 20 - size + 1, size)]
    for start in bounds[1:]:
        x[start:] += 1e5
    layer = layer_for(x.shape, "float32", virtual_batch_size=size)
    got = Step(layer, mode)(x, upstream)["y"]
    x = x.astype("float32").astype("float64")
    for a, b in itertools.pairwise([*bounds, 20]):
        part = x[a:b]
        want = (part - part.mean((0, 1))) / np.sqrt(part.var((0, 1)) + 1e-3)
        assert np.abs(got[a:b] - want).max() < 1e-4
    assert array(layer.moving_mean).shape == (256,)
