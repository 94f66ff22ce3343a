"""Properties of a training step, on drawn shapes, axes, masks and options."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from support.cases import Case, check
from support.steps import array

import keras_bn
from keras_bn import Moments
from keras_bn.backends import backend
from keras_bn.backends.plan import Plan

LIMITS = settings(max_examples=25, deadline=None)

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)
options = st.fixed_dictionaries(
    {},
    optional={
        "unbiased": st.booleans(),
        "virtual_batch_size": st.integers(1, 4),
        "momentum": st.sampled_from([0.0, 0.5, 0.99, 1.0]),
        "epsilon": st.sampled_from([1e-5, 1e-3, 0.1]),
    },
)


@st.composite
def cases(draw, mode="eager"):
    shape = draw(shapes)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    chosen = draw(options)
    if axis % len(shape) == 0:
        chosen.pop("virtual_batch_size", None)
    return Case(
        shape,
        axis,
        draw(st.none() | st.sampled_from([0.0, 0.3, 0.8, 1.0])),
        draw(st.sampled_from([0.0, -5.0, 1e3, 1e5])),
        mode,
        chosen,
        draw(st.integers(0, 2**32 - 1)),
    )


@LIMITS
@given(cases())
def test_a_step_is_the_oracles(case):
    check(case)


@LIMITS
@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_the_order_of_the_batch_does_not_matter(n, seed):
    rng = np.random.default_rng(seed)
    x, order = rng.normal(3, 2, (n, 4, 3)), rng.permutation(n)
    layers = [keras_bn.BatchNormalization(dtype="float64") for _ in range(2)]
    y, shuffled = (
        array(layer(v, training=True))
        for layer, v in zip(layers, (x, x[order]), strict=True)
    )
    np.testing.assert_allclose(shuffled, y[order], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(layers[1].moving_mean, layers[0].moving_mean, rtol=1e-12)


@LIMITS
@given(
    st.floats(0.1, 10), st.floats(-100, 100), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_affine_invariance(scale, shift, negative, seed):
    """BN(a x + b) = ± BN(x) when epsilon is 0."""
    x = np.random.default_rng(seed).normal(3, 2, (8, 3))
    scale = -scale if negative else scale
    layer = keras_bn.BatchNormalization(dtype="float64", epsilon=0)
    y, moved = (array(layer(v, training=True)) for v in (x, scale * x + shift))
    np.testing.assert_allclose(moved, np.sign(scale) * y, rtol=1e-8, atol=1e-9)


def moments_of(x):
    x = ops.convert_to_tensor(x)
    plan = Plan("plain", axes=(1,))
    _, batch = backend.forward(x, None, None, None, epsilon=1e-3, plan=plan)
    return Moments(*(array(part) for part in batch))


@LIMITS
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.sampled_from([0.0, 1e4]),
    st.integers(0, 2**32 - 1),
)
def test_one_batch_is_its_merged_parts(sizes, offset, seed):
    x = np.random.default_rng(seed).normal(offset, 1, (sum(sizes), 3))
    merged, *others = (moments_of(part) for part in np.split(x, np.cumsum(sizes)[:-1]))
    for other in others:
        merged = merged.merge(other)
    whole = moments_of(x)
    assert float(merged.count) == float(whole.count) == sum(sizes)
    if sum(sizes):
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(merged.variance, whole.variance, atol=1e-9)


@LIMITS
@given(st.integers(1, 8), st.floats(0.2, 1), st.integers(0, 2**32 - 1))
def test_masked_is_the_compacted_input(n, share, seed):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(3, 2, (n, 4, 3)), rng.random((n, 4)) < share
    masked, compact = (
        keras_bn.BatchNormalization(dtype="float64", momentum=0.5) for _ in range(2)
    )
    y = array(masked(x, training=True, mask=mask))
    want = array(compact(x[mask], training=True))
    np.testing.assert_allclose(y[mask], want, rtol=1e-10, atol=1e-11)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_allclose(
            array(getattr(masked, name)), array(getattr(compact, name)), rtol=1e-12
        )
