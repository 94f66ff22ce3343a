"""Statistics as values: saved, pooled, put into models, and taken back."""

import errno
import functools
import itertools
import pickle

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from support.zoo import convolutional, inputs_of, masked, randomized

import keras_bn
from keras_bn import Moments, Statistics

OURS = keras_bn.BatchNormalization
KERAS = layers.BatchNormalization
pytestmark = pytest.mark.filterwarnings("ignore:The statistics of")


def of(model, *data, **options):
    return keras_bn.statistics(model, *data, verbose=0, **options)


def chain(*stack):
    return randomized(keras.Sequential([keras.Input((4,)), *stack]))


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(3.0, 2.0, (n, 4)).astype("float32")


def state(model):
    return [variable.numpy() for variable in model.variables]


def same(got, expected, **tolerance):
    assert list(got) == list(expected)
    for path in expected:
        for a, b in zip(got[path], expected[path], strict=True):
            np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 1e-6}))


@pytest.mark.parametrize("bn", [OURS, KERAS])
def test_statistics_and_set_statistics_are_recalibrate(bn):
    make = lambda: randomized(convolutional(bn))  # noqa: E731
    first, second = make(), make()
    second.set_weights(first.get_weights())
    x = inputs_of(first, 20)
    before = state(first)
    found = of(first, x)
    for a, b in zip(state(first), before, strict=True):
        np.testing.assert_array_equal(a, b)
    same(keras_bn.recalibrate(second, x, verbose=0), found)
    keras_bn.set_statistics(first, found)
    for a, b in zip(state(first), state(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert found.samples == 20


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 9))
def test_any_split_pools_to_one_pass(cuts, seed):
    x = np.sort(rows(60, seed), axis=0)  # so that no part is like another
    cuts = [0, *sorted(cuts), 60]
    parts = [of(CHAIN, x[a:b]) for a, b in itertools.pairwise(cuts)]
    whole = keras_bn.pooled(parts)
    np.testing.assert_allclose(whole["bn"].count, 60)
    np.testing.assert_allclose(whole["bn"].mean, x.mean(0, "float64"), rtol=1e-6)
    np.testing.assert_allclose(whole["bn"].variance, x.var(0, "float64"), rtol=1e-5)
    same(whole, of(CHAIN, x), rtol=1e-5)
    assert whole.samples == 60


CHAIN = chain(OURS(name="bn"))


@pytest.mark.parametrize("make", [convolutional, masked])
def test_parts_cut_between_batches_pool_to_one_pass(make):
    model = randomized(make(OURS))
    x = inputs_of(model, 40)
    options = {"batch_size": 8, "include_frozen": True}
    parts = [of(model, x[a:b], **options) for a, b in ((0, 8), (8, 8), (8, 40))]
    same(keras_bn.pooled(parts), of(model, x, **options), rtol=1e-6, atol=1e-7)


def test_averaging_variances_is_off_by_the_distance_of_the_means():
    x = rows(200)
    x[100:] += 10.0
    first, second = of(CHAIN, x[:100]), of(CHAIN, x[100:])
    average = (first["bn"].variance + second["bn"].variance) / 2
    distance = second["bn"].mean - first["bn"].mean
    whole = keras_bn.pooled([first, second])["bn"].variance
    np.testing.assert_allclose(whole - average, distance**2 / 4, rtol=1e-6)


def test_files_and_pickles(tmp_path):
    model = randomized(convolutional(OURS))
    for value in of(model, inputs_of(model, 10)), of(model):
        value.save(tmp_path / "monday.npz")
        for again in (
            Statistics.load(tmp_path / "monday.npz"),
            pickle.loads(pickle.dumps(value)),
        ):
            assert again.samples == value.samples
            same(again, value, rtol=0)
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    (tmp_path / "garbage.npz").write_bytes(b"garbage")
    (tmp_path / "empty.npz").touch()
    (tmp_path / "cut.npz").write_bytes((tmp_path / "monday.npz").read_bytes()[:200])
    for name in "other", "garbage", "empty", "cut":
        with pytest.raises(ValueError, match=r"`Statistics\.save` has written"):
            Statistics.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "none.npz")


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "monday"
    value = of(CHAIN, rows(40))
    value.save(path)

    def broken(file, **arrays):
        file.write(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match=r"monday can't be written: No space left"):
        of(CHAIN, rows(8)).save(path)
    same(Statistics.load(path), value, rtol=0)
    assert list(tmp_path.iterdir()) == [path]


def test_moving_statistics_have_no_count():
    model = chain(OURS(name="a", unbiased=True), layers.Dense(3), KERAS(name="b"))
    before = state(model)
    old = of(model)
    assert old.samples is None
    assert not old.has_counts
    keras_bn.set_statistics(model, old)
    for a, b in zip(state(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    new = of(model, rows(60))
    with pytest.raises(ValueError, match=r"Part 2 of 2 .*counted\(1000\)`"):
        keras_bn.pooled([new, old])
    with pytest.raises(ValueError, match="samples=-1"):
        old.counted(-1)
    keras_bn.set_statistics(model, keras_bn.pooled([old.counted(20), new]))
    mixed = state(model)
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    keras_bn.recalibrate(model, rows(60), prior=20, verbose=0)
    for a, b in zip(state(model), mixed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert keras_bn.pooled([old.counted(3), old.counted(1)]).samples == 4


@pytest.mark.parametrize("make", [functools.partial(OURS, renorm=True), KERAS])
def test_using_gives_all_back(make):
    model = chain(make(name="bn"), layers.Dense(2))
    x = rows(100)
    before, expected = state(model), model.predict(x, verbose=0)
    night = of(model, x + 5.0)
    with keras_bn.using(model, night) as same_model:
        assert same_model is model
        inside = model.predict(x, verbose=0)
    assert np.abs(inside - expected).max() > 0.1
    with pytest.raises(KeyError), keras_bn.using(model, night):
        raise KeyError
    for a, b in zip(state(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


def test_what_is_no_mapping_is_refused():
    model = keras.Sequential([keras.Input((1,)), keras_bn.BatchNormalization()])
    statistics = keras_bn.statistics(model)
    for wrong in (None, [statistics], 3.0):
        with pytest.raises(TypeError, match=r"must be a mapping .* Received: "):
            keras_bn.set_statistics(model, wrong)
    with pytest.raises(TypeError, match="must be a mapping"):
        keras_bn.pooled(statistics)  # its paths


def test_what_does_not_fit_is_refused_with_both_lists():
    model = chain(OURS(name="a"), OURS(name="b"))
    before, ones = state(model), np.ones(4)
    good = Moments(ones, ones, ones)
    for wrong, message in (
        ({"a": good, "c": good}, r"Only in the one: c \(4,\).* other: b \(4,\)"),
        ({"a": good}, r"Only in the one: nothing.* other: b \(4,\)"),
        (
            {"a": good, "b": Moments(1, ones[:3], ones[:3])},
            r"b \(3,\).* other: b \(4,\)",
        ),
        ({"a": good, "b": Moments(0, ones, ones)}, "No element of the data counts"),
    ):
        for put in keras_bn.set_statistics, use:
            with pytest.raises(ValueError, match=message):
                put(model, Statistics(wrong))
    for a, b in zip(state(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    for wrong in Moments(ones, ones, ones[:3]), Moments(ones[:3], ones, ones):
        with pytest.raises(ValueError, match=r"Moments of 'b' .*\(3,\)"):
            keras_bn.set_statistics(model, {"a": good, "b": wrong})
    with pytest.raises(ValueError, match="different layers or shapes"):
        keras_bn.pooled([Statistics({"a": good}), Statistics({"b": good})])
    with pytest.raises(ValueError, match="must not be empty"):
        keras_bn.pooled([])


def test_a_channel_that_holds_no_statistics_keeps_its_own():
    model = chain(OURS(name="bn"))
    before = of(model)["bn"]
    for name, bad in ("mean", np.nan), ("variance", np.inf), ("variance", -1.0):
        new = Moments(np.ones(4), np.full(4, 3.0), np.full(4, 2.0))
        getattr(new, name)[1] = bad
        for statistics in Statistics({"bn": new}), Statistics({"bn": new}).counted(5):
            keras_bn.set_statistics(model, statistics)
            mean, variance = (v.numpy() for v in model.layers[0].variables[2:])
            np.testing.assert_allclose(mean, [3.0, before.mean[1], 3.0, 3.0])
            np.testing.assert_allclose(variance, [2.0, before.variance[1], 2.0, 2.0])
        getattr(new, name)[:] = bad
        with pytest.raises(ValueError, match="No element of the data counts for bn"):
            keras_bn.set_statistics(model, {"bn": new})


def test_a_running_average_begins_again_from_what_is_set():
    model = chain(OURS(name="bn"))
    keras_bn.adapt(model, memory=0.9)
    night = of(model, rows(100) + 5.0)
    layer = model.get_layer("bn")
    model.predict(rows(40), verbose=0)
    before = state(model)
    with keras_bn.using(model, night):
        np.testing.assert_array_equal(layer.adapted_mean, layer.moving_mean)
        model.predict(rows(40), verbose=0)
    for a, b in zip(state(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    keras_bn.set_statistics(model, night)
    np.testing.assert_array_equal(layer.adapted_variance, layer.moving_variance)


def use(model, statistics):
    with keras_bn.using(model, statistics):
        pass


def test_frozen_layers_may_be_left_out():
    model = chain(OURS(name="a"), OURS(name="b", freeze_statistics=True))
    found = of(model, rows(100))
    assert list(found) == ["a"]
    frozen = model.get_layer("b").moving_mean.numpy()
    keras_bn.set_statistics(model, found)
    np.testing.assert_array_equal(model.get_layer("b").moving_mean, frozen)
    np.testing.assert_allclose(
        model.get_layer("a").moving_mean, rows(100).mean(0), rtol=1e-5
    )
