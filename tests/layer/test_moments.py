"""Moments and the moving statistics, as properties of arrays."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from keras_bn import Moments
from keras_bn.layer import moving

values = st.floats(-1e3, 1e3, allow_subnormal=False)


def of(rows):
    if len(rows) == 0:
        return Moments(np.float64(0), np.full(2, np.nan), np.full(2, np.nan))
    return Moments(np.float64(len(rows)), rows.mean(0), rows.var(0))


def assert_close(got, want, scale=1.0):
    np.testing.assert_array_equal(got.count, want.count)
    if want.count > 0:
        np.testing.assert_allclose(got.mean, want.mean, rtol=1e-12, atol=1e-12 * scale)
        np.testing.assert_allclose(
            got.variance, want.variance, rtol=1e-11, atol=1e-11 * scale**2
        )


rows = st.integers(0, 9).flatmap(
    lambda n: arrays.arrays(np.float64, (n, 2), elements=values)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=1, max_size=4), st.sampled_from([0.0, 1e4, -1e6]))
def test_merged_parts_are_the_whole(parts, offset):
    parts = [part + offset for part in parts]
    merged = of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(of(part))
    assert_close(merged, of(np.concatenate(parts)), scale=1e3 + abs(offset) * 1e-3)


@settings(max_examples=40, deadline=None)
@given(rows, rows)
def test_merge_commutes(a, b):
    assert_close(of(a).merge(of(b)), of(b).merge(of(a)), scale=1e3)


def test_an_empty_side_changes_nothing():
    some = of(np.array([[1.0, 5.0], [2.0, 9.0]]))
    for merged in (some.merge(of([])), of([]).merge(some)):
        assert_close(merged, some)
    assert float(of([]).merge(of([])).count) == 0


def test_merge_does_not_cancel_at_large_means():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1e4, 1, (2, 500, 1)).astype("float32")

    def single(x):
        return Moments(np.float32(500), x.mean(0), x.var(0))

    exact = np.concatenate([a, b]).astype("float64").var(0)
    np.testing.assert_allclose(single(a).merge(single(b)).variance, exact, rtol=1e-4)


def test_counts_may_differ_by_channel():
    a = Moments(np.array([2.0, 0.0]), np.array([1.0, np.nan]), np.array([1.0, np.nan]))
    b = Moments(np.array([2.0, 3.0]), np.array([3.0, 5.0]), np.array([1.0, 2.0]))
    merged = a.merge(b)
    np.testing.assert_allclose(merged.count, [4, 3])
    np.testing.assert_allclose(merged.mean, [2, 5])
    np.testing.assert_allclose(merged.variance, [2, 2])


def test_unbiased():
    x = np.random.default_rng(0).normal(size=(7, 2))
    np.testing.assert_allclose(of(x).unbiased().variance, x.var(0, ddof=1), rtol=1e-12)
    assert np.isnan(of(x[:1]).unbiased().variance).all()


def exponential(old, batch, momentum):
    new = moving.update(moving.State(*old), batch, moving.Rule(momentum))
    return tuple(map(keras.ops.convert_to_numpy, (new.mean, new.variance)))


def test_exponential_step():
    old_mean, old_variance = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    batch = Moments(np.float64(5), np.array([11.0, 12.0]), np.array([13.0, 14.0]))
    mean, variance = exponential((old_mean, old_variance), batch, 0.9)
    np.testing.assert_allclose(mean, [2, 3])
    np.testing.assert_allclose(variance, [4, 5])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["mean", "variance"])
def test_exponential_keeps_both_statistics_of_a_bad_channel(bad, where):
    old = np.array([1.0, 2.0], "float32"), np.array([3.0, 4.0], "float32")
    batch = Moments(5.0, np.ones(2, "float32"), np.ones(2, "float32"))
    getattr(batch, where)[1] = bad
    for was, now in zip(old, exponential(old, batch, 0.5), strict=True):
        assert now[1] == was[1]
        assert now[0] == (was[0] + 1) / 2


def test_exponential_keeps_everything_when_nothing_counts():
    old = np.array([0.1, 0.2], "float32"), np.array([0.3, 0.4], "float32")
    batch = Moments(0.0, np.zeros(2, "float32"), np.zeros(2, "float32"))
    for was, now in zip(old, exponential(old, batch, 0.9), strict=True):
        np.testing.assert_array_equal(now, was)


def test_the_dtype_of_the_old_statistics_stays():
    old = np.zeros(2, "float32"), np.ones(2, "float32")
    batch = Moments(4.0, np.ones(2), np.ones(2))
    assert [t.dtype.name for t in exponential(old, batch, 0.9)] == [
        "float32",
        "float32",
    ]
