"""Masks: what they leave out takes no part, on whichever axis the channels are."""

import itertools

import keras
import numpy as np
import pytest
from support import backend
from support.marks import mostly_slow_cases
from support.steps import (
    MODES,
    Step,
    array,
    oracle_step,
    relative_error,
    set_parameters,
)

import keras_bn

CASES = [
    ((8, 5, 3), -1),
    ((8, 3, 5), 1),
    ((4, 3, 2, 5), 1),
    ((4, 5, 3, 2), 2),
    ((9, 3), 1),
]
# Those of the default run.
USUAL = [((8, 3, 5), 1), ((4, 5, 3, 2), 2)]


def draw(shape, axis, seed=0):
    rng = np.random.default_rng(seed)
    rest = [n for a, n in enumerate(shape) if a != axis % len(shape)]
    mask = rng.random(rest) < 0.6
    return rng.normal(3, 2, shape), rng.normal(size=shape), mask


def ours(shape, axis, dtype="float64", **arguments):
    rng = np.random.default_rng(7)
    layer = keras_bn.BatchNormalization(axis=axis, dtype=dtype, **arguments)
    layer.build(shape)
    gamma, beta = rng.normal(1, 0.3, (2, shape[axis]))
    set_parameters(layer, gamma, beta)
    return layer, gamma, beta


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), mostly_slow_cases(CASES, USUAL))
def test_masked_step_is_the_oracles(shape, axis, mode):
    x, upstream, mask = draw(shape, axis)
    layer, gamma, beta = ours(shape, axis)
    got = Step(layer, mode, mask)(x, upstream)
    axes = (axis % len(shape),)
    want = oracle_step(layer, x, upstream, axes, gamma, beta, mask)
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-12, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e38, 3e38])
@pytest.mark.parametrize(("shape", "axis"), mostly_slow_cases(CASES, USUAL))
def test_masked_values_touch_nothing_else(shape, axis, junk, mode):
    x, upstream, mask = draw(shape, axis)
    spread = np.expand_dims(mask, axis) & np.ones(shape, bool)
    upstream = np.where(spread, upstream, 0)
    layer, _, _ = ours(shape, axis, dtype="float32")
    step = Step(layer, mode, mask)
    clean = step(x, upstream)
    dirty = step(np.where(spread, x, junk), upstream)
    for name in clean:
        keep = spread if clean[name].shape == shape else ...
        np.testing.assert_array_equal(dirty[name][keep], clean[name][keep], name)


@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_masked_equals_compacted(shape, axis):
    x, _, mask = draw(shape, axis)
    layer, _, _ = ours(shape, axis, momentum=0.0)
    layer(x, training=True, mask=mask)
    compact, _, _ = ours((int(mask.sum()), shape[axis]), -1, momentum=0.0)
    compact(np.moveaxis(x, axis, -1)[mask], training=True)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_allclose(
            array(getattr(layer, name)), array(getattr(compact, name)), rtol=1e-13
        )


@pytest.mark.parametrize("mode", MODES)
def test_sizes_of_one_broadcast(mode):
    x, upstream, _ = draw((8, 5, 3), -1)
    mask = np.random.default_rng(1).random((8, 1)) < 0.5
    layer, _, _ = ours((8, 5, 3), -1)
    narrow = Step(layer, mode, mask)(x, upstream)
    wide = Step(layer, mode, np.repeat(mask, 5, axis=1))(x, upstream)
    # On JAX the order of a sum is not known.
    tolerance = {"rtol": 1e-13, "atol": 1e-13} if backend.NAME == "jax" else {"rtol": 0}
    for name in wide:
        np.testing.assert_allclose(narrow[name], wide[name], **tolerance)


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32"])
def test_masks_of_any_dtype(dtype):
    x, _, mask = draw((8, 5, 3), -1)
    layer, _, _ = ours((8, 5, 3), -1)
    layer(x, training=True, mask=mask.astype(dtype))
    other, _, _ = ours((8, 5, 3), -1)
    other(x, training=True, mask=mask)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), other.moving_mean.numpy())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, backend.tensor(True)])
def test_keras_hands_the_mask_on(training, mode):
    """From a Masking layer, through ours, to the next; `training` may be a tensor."""
    x = np.random.default_rng(0).normal(3, 1, (4, 6, 2)).astype("float32")
    x[:, 4:] = 0
    masking, layer = keras.layers.Masking(), keras_bn.BatchNormalization(momentum=0.0)
    layer.build(x.shape)
    pooling = keras.layers.GlobalAveragePooling1D()

    def run(x):
        y = layer(masking(x), training=training)
        return y, pooling(y)

    y, mean = backend.in_mode(run, mode, layer.variables)(backend.tensor(x))
    np.testing.assert_allclose(
        backend.array(layer.moving_mean), x[:, :4].mean((0, 1)), rtol=1e-5
    )
    expected = backend.array(y)[:, :4].mean(1)
    np.testing.assert_allclose(backend.array(mean), expected, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [None, 3, 16])
def test_fully_masked_batch_leaves_statistics_alone(size, mode):
    x, upstream, mask = draw((8, 5, 3), -1)
    layer, _, _ = ours((8, 5, 3), -1, dtype="float32", virtual_batch_size=size)
    got = Step(layer, mode, np.zeros_like(mask))(x, upstream)
    np.testing.assert_array_equal(got["moving_mean"], np.zeros(3))
    np.testing.assert_array_equal(got["moving_variance"], np.ones(3))
    assert all(np.isfinite(value).all() for value in got.values())


def test_inference_does_not_look_at_the_mask():
    x, _, mask = draw((8, 5, 3), -1)
    layer, _, _ = ours((8, 5, 3), -1)
    np.testing.assert_array_equal(array(layer(x, mask=mask)), array(layer(x)))


def of_unknown_sizes(function, *specs):
    tf = backend.tensorflow("sizes are always known elsewhere")
    return tf.function(function, [tf.TensorSpec(*spec) for spec in specs])


def test_unknown_sizes():
    """What is known of them says that the mask goes without the channel axis."""
    layer, _, _ = ours((8, 3, 5), 1)

    run = of_unknown_sizes(
        lambda x, mask: layer(x, training=True, mask=mask),
        ((None, 3, None), "float64"),
        ((None, 5), "bool"),
    )
    x, _, mask = draw((8, 3, 5), 1)
    other, _, _ = ours((8, 3, 5), 1)
    np.testing.assert_allclose(run(x, mask), array(other(x, training=True, mask=mask)))


# Masks of the leading axes, as Masking and Embedding give them, wherever the channels
# are: each channel then has a count of its own.
LEADING = [((8, 5, 3), 1), ((8, 5, 5), 1), ((4, 3, 2, 5), 1), ((4, 3, 2, 5), 2)]


def leading(shape, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape[:-1]) < 0.6
    return rng.normal(3, 2, shape), rng.normal(size=shape), mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), LEADING)
def test_a_mask_of_the_leading_axes_is_the_oracles(shape, axis, mode):
    """Channel by channel, as the oracle knows of no mask along channels."""
    x, upstream, mask = leading(shape)
    layer, gamma, beta = ours(shape, axis)
    got = Step(layer, mode, mask)(x, upstream)
    elements = np.broadcast_to(mask[..., None], shape)
    for c in range(shape[axis]):
        one = [np.take(t, [c], axis) for t in (x, upstream, elements)]
        want = oracle_step(
            layer, *one[:2], (axis,), gamma[[c]], beta[[c]], np.squeeze(one[2], axis)
        )
        for name, value in want.items():
            whole = got[name].ndim > 1
            mine = np.take(got[name], [c], axis if whole else 0)
            assert relative_error(mine, value) < 1e-12, (name, c)


def broadcasting(shape, axes):
    """Every shape of a mask that may stand for an input with these channel axes."""
    rows = tuple(n for a, n in enumerate(shape) if a not in axes)
    whole = {shape[:-1], rows}
    return sorted({m for w in whole for m in itertools.product(*((1, n) for n in w))})


# On every pair of axes of three, and on some of four.
PAIRS = [
    (shape, axes, mask, mode)
    for shape, pairs in (
        ((6, 3, 2), [(0, 1), (0, 2), (1, 2)]),
        ((5, 3, 2, 4), [(1, 2), (2, 3), (1, 3), (0, 3)]),
        ((5, 3, 2, 4), [(1, 2, 3), (0, 1, 3)]),
    )
    for axes in pairs
    for mask in broadcasting(shape, axes)
    for mode in (MODES if mask == shape[:-1] else MODES[:1])
]


@pytest.mark.parametrize(
    ("shape", "axes", "sizes", "mode"), mostly_slow_cases(PAIRS, PAIRS[::3])
)
def test_a_mask_broadcasts_on_any_pair_of_axes(shape, axes, sizes, mode):
    """Channel by channel, for each may have a count of its own, or none at all."""
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(3, 2, shape), rng.normal(size=shape)
    mask = rng.random(sizes) < 0.7
    layer = keras_bn.BatchNormalization(axis=list(axes), dtype="float64")
    layer.build(shape)
    along = tuple(shape[a] for a in axes)
    gamma, beta = rng.normal(1, 0.3, (2, *along))
    set_parameters(layer, gamma, beta)
    got = Step(layer, mode, mask)(x, upstream)
    # What the shape stands for: the leading axes where it may be either.
    lies = range(len(shape) - 1)
    if len(sizes) != len(lies) or any(
        n not in (1, shape[a]) for a, n in zip(lies, sizes, strict=True)
    ):
        lies = [a for a in range(len(shape)) if a not in axes]
    missing = tuple(a for a in range(len(shape)) if a not in lies)
    elements = np.broadcast_to(np.expand_dims(mask, missing), shape)
    for channel in np.ndindex(along):
        at = [slice(None)] * len(shape)
        for axis, index in zip(axes, channel, strict=True):
            at[axis] = index
        at, rows = tuple(at), elements[tuple(at)].reshape(-1)
        one = x[at].reshape(-1, 1), upstream[at].reshape(-1, 1)
        if not rows.any():
            assert got["moving_mean"][channel] == 0
            assert got["moving_variance"][channel] == 1
            continue
        parameters = gamma[channel].reshape(1), beta[channel].reshape(1)
        want = oracle_step(layer, *one, (1,), *parameters, rows)
        for name, value in want.items():
            mine = got[name][at] if got[name].ndim == len(shape) else got[name][channel]
            mine = mine.reshape(value.shape)
            np.testing.assert_allclose(mine, value, 1e-10, 1e-12, err_msg=name)


def test_a_model_with_masking_and_several_channel_axes_fits():
    x = np.random.default_rng(0).normal(3, 2, (8, 3, 2)).astype("float32")
    x[5:, 2] = 0
    layer = keras_bn.BatchNormalization(axis=[1, 2], momentum=0.0)
    model = keras.Sequential([keras.layers.Masking(), layer, keras.layers.Flatten()])
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((8, 6)), batch_size=8, verbose=0)
    want = x.mean(0)
    want[2] = x[:5, 2].mean(0)
    np.testing.assert_allclose(array(layer.moving_mean), want, rtol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((8, 5, 3), -1), *LEADING])
def test_a_mask_of_the_leading_axes_is_keras(shape, axis):
    """To 1e-7, the epsilon that Keras adds to the count (ours is exact)."""
    x, upstream, mask = leading(shape)
    layer, gamma, beta = ours(shape, axis)
    theirs = keras.layers.BatchNormalization(axis=axis, dtype="float64")
    theirs.build(shape)
    set_parameters(theirs, gamma, beta)
    got = Step(layer, mask=mask)(x, upstream)
    want = Step(theirs, mask=backend.tensor(mask))(x, upstream)
    tolerance = 1e-7 if backend.KERAS_IS_A_JUDGE else 1e-5
    for name in want:
        assert relative_error(got[name], want[name]) < tolerance, name


@pytest.mark.parametrize("mode", MODES)
def test_a_channel_that_is_masked_whole_keeps_its_statistics(mode):
    x, upstream, mask = leading((8, 5, 3))
    mask[:, 2] = False
    layer, _, _ = ours((8, 5, 3), 1)
    got = Step(layer, mode, mask)(x, upstream)
    kept = [0, 0, 1, 0, 0]
    np.testing.assert_array_equal(got["moving_mean"] == 0, kept)
    np.testing.assert_array_equal(got["moving_variance"] == 1, kept)


def test_what_may_be_either_is_the_leading_axes_and_refused_in_words_if_not():
    layer, _, _ = ours((8, 3, 5), 1)

    run = of_unknown_sizes(
        lambda x, mask: layer(x, training=True, mask=mask),
        ((None, 3, None), "float64"),
        ((None, None), "bool"),
    )
    x, _, mask = leading((8, 3, 5))
    other, _, _ = ours((8, 3, 5), 1)
    np.testing.assert_allclose(run(x, mask), array(other(x, training=True, mask=mask)))
    before = layer.get_weights()
    with pytest.raises(Exception, match="The mask must have the") as raised:
        run(x, np.ones((8, 5), bool))
    assert type(raised.value).__name__ == "InvalidArgumentError"
    for was, now in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(now, was)


@pytest.mark.parametrize("shape", [(8,), (8, 4), (8, 3, 5), (8, 3, 1)])
def test_masks_of_other_shapes_are_refused_in_words(shape):
    layer, _, _ = ours((8, 3, 5), 1)
    with pytest.raises(ValueError, match=r"leading axes, \(8, 3\), or \(8, 5\)"):
        layer(np.ones((8, 3, 5)), training=True, mask=np.ones(shape, bool))
