"""StatisticsLogger: its numbers against plain NumPy, its files, and going on."""

import csv
import sys

import keras
import numpy as np
import pytest
from conftest import require
from keras import layers
from support.backend import array

import keras_bn
from keras_bn.diagnosis.logger import DriftRow

OURS = keras_bn.BatchNormalization
KERAS = layers.BatchNormalization


def data(n=96):
    rng = np.random.default_rng(0)
    return rng.normal([3.0, -1.0, 5.0], [1.0, 2.0, 3.0], (n, 3)).astype("float32")


def made(bn=OURS, compiled=False, **options):
    """The model; not compiled into a graph, a few steps take a tenth of the time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, name="dense", use_bias=False),
            bn(name="bn", **options),
            layers.Dense(2, name="head"),
        ],
        name="model",
    )
    model.compile("adam", "mse", run_eagerly=not compiled)
    return model


def fit(model, *callbacks, **options):
    x = data()
    options = {"epochs": 2, "verbose": 0, "shuffle": False, **options}
    model.fit(x, x[:, :2], callbacks=callbacks, **options)


def expected(model):
    """By plain NumPy: what a row says of the normalization, but for the gap."""
    x = data().astype("float64") @ model.get_layer("dense").kernel.numpy()
    layer = model.get_layer("bn")
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    epsilon = layer.epsilon
    drift = np.abs(mean - x.mean(0)) / np.sqrt(x.var(0) + epsilon)
    log = np.log((variance + epsilon) / (x.var(0) + epsilon))
    return [
        np.median(drift),
        drift.max(),
        np.log(np.median(np.exp(log / 2))) * 2,
        log[np.argmax(np.abs(log))],
    ]


@pytest.mark.parametrize("bn", [OURS, KERAS])
def test_values_are_those_of_plain_numpy_at_every_epoch(bn):
    model = made(bn, compiled=True, momentum=0.9)
    logger = keras_bn.StatisticsLogger(data())
    seen = [expected(model)]
    spy = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(expected(model))
    )
    fit(model, logger, spy, epochs=3)
    rows = [row for row in logger.rows if row.layer == "bn"]
    assert [row.epoch for row in rows] == [0, 1, 2, 3]
    np.testing.assert_allclose([row[2:6] for row in rows], seen, rtol=1e-4, atol=1e-5)
    assert rows[3].mean_drift < 0.5 * rows[0].mean_drift


def test_the_gap_of_the_output_is_that_of_the_model():
    model = made()
    logger = keras_bn.StatisticsLogger(data(), batch_size=96)
    fit(model, logger)
    last = logger.rows[-1]
    assert last[:2] == (2, "model")
    assert np.isnan(last[2:6]).all()
    inference, training = (
        array(model(data(), training=mode)) for mode in (False, True)
    )
    gap = np.sqrt(np.mean((training - inference) ** 2)) / training.std()
    assert last.output_gap == pytest.approx(gap, rel=1e-4)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_after_1024_samples_only_the_statistics_go_on(compiled, labels):
    model = made(compiled=compiled)
    x = np.concatenate([data(1024), data(1000) + 7.0])  # not in random order
    whole, first = (
        keras_bn.StatisticsLogger(
            (part, part[:, :2]) if labels else part, batch_size=64
        )
        for part in (x, x[:1024])
    )
    for logger in (whole, first):
        logger.set_model(model)
        logger.on_train_begin()
        logger.on_epoch_begin(0)
    kernel = model.get_layer("dense").kernel.numpy()
    for logger, part in ((whole, x), (first, x[:1024])):
        y = part.astype("float64") @ kernel
        drift = np.abs(y.mean(0)) / np.sqrt(y.var(0) + model.get_layer("bn").epsilon)
        assert logger.rows[0].mean_drift == pytest.approx(np.median(drift), rel=1e-4)
    for all_of_it, of_first in zip(whole.rows, first.rows, strict=True):
        assert all_of_it.output_gap == of_first.output_gap


def test_training_is_what_it_is_without(tmp_path):
    with_it, without = made(compiled=True), made(compiled=True)
    fit(with_it, keras_bn.StatisticsLogger(data(), tmp_path / "a.csv"))
    fit(without)
    for a, b in zip(with_it.variables, without.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def read(file):
    with open(file, encoding="utf-8", newline="") as opened:
        header, *lines = csv.reader(opened)
    assert tuple(header) == DriftRow._fields
    return [(int(line[0]), line[1], *map(float, line[2:])) for line in lines]


def epochs(rows):
    return [row[0] for row in rows if row[1] == "bn"]


def test_the_file_has_every_row_and_is_whole_at_every_epoch(tmp_path):
    file = tmp_path / "a.csv"
    logger = keras_bn.StatisticsLogger(data(), file)
    seen = []
    spy = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append((len(read(file)), rest(tmp_path)))
    )
    fit(made(), logger, spy, epochs=3)
    assert seen == [(4, []), (6, []), (8, [])]
    np.testing.assert_array_equal(
        [row[2:] for row in read(file)], [row[2:] for row in logger.rows]
    )


def rest(folder):
    """What was left beside the file."""
    return [path.name for path in folder.iterdir() if path.name != "a.csv"]


def test_it_starts_anew_or_goes_on(tmp_path):
    file = tmp_path / "a.csv"
    model = made()
    fit(model, keras_bn.StatisticsLogger(data(), file), epochs=2)
    first = read(file)
    assert epochs(first) == [0, 1, 2]

    logger = keras_bn.StatisticsLogger(data(), file, append=True)
    fit(model, logger, initial_epoch=2, epochs=4)
    assert epochs(read(file)) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(
        [row[2:] for row in read(file)[: len(first)]], [row[2:] for row in first]
    )

    # From a checkpoint of the first epoch: what came after it then is not this run's.
    fit(model, logger, initial_epoch=1, epochs=2)
    assert epochs(read(file)) == epochs(logger.rows) == [0, 1, 2]
    np.testing.assert_array_equal(
        [row[2:] for row in read(file)[:4]], [row[2:] for row in first[:4]]
    )
    assert read(file)[-2][2:] != first[-2][2:]

    fit(model, keras_bn.StatisticsLogger(data(), file), initial_epoch=5, epochs=6)
    assert epochs(read(file)) == [5, 6]


def test_samples_that_are_not_finite_are_told_once():
    x = data()
    x[[5, 50]] = np.nan
    logger = keras_bn.StatisticsLogger(x)
    message = r"StatisticsLogger: 2 of 96 samples .* left out; the first is sample 5\."
    with pytest.warns(UserWarning, match=message) as caught:
        fit(made(), logger)
    assert len([w for w in caught if "left out" in str(w.message)]) == 1
    assert np.isfinite(logger.rows[-1].output_gap)


def test_without_a_file_rows_go_on_in_memory():
    model, logger = made(), keras_bn.StatisticsLogger(data(), append=True)
    fit(model, logger, epochs=1)
    fit(model, logger, initial_epoch=1, epochs=2)
    assert epochs(logger.rows) == [0, 1, 2]
    logger.append = False
    fit(model, logger, epochs=1)
    assert epochs(logger.rows) == [0, 1]


def test_a_file_that_cannot_be_is_refused_before_training(tmp_path):
    model = made()
    logger = keras_bn.StatisticsLogger(data(), tmp_path / "no" / "a.csv")
    with pytest.raises(OSError, match="no folder"):
        fit(model, logger)
    other = tmp_path / "other.csv"
    other.write_text("epoch,loss\n0,1.0\n")
    logger = keras_bn.StatisticsLogger(data(), other, append=True)
    with pytest.raises(ValueError, match="with the columns epoch, loss"):
        fit(model, logger)
    assert other.read_text() == "epoch,loss\n0,1.0\n"
    assert not model.optimizer.iterations.numpy()


def test_a_training_goes_on_when_its_file_can_no_longer_be_written(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    logger = keras_bn.StatisticsLogger(data(), folder / "a.csv")

    class Remove(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                (folder / "a.csv").unlink()
                folder.rmdir()

    with pytest.warns(UserWarning, match=r"a\.csv can't be written") as caught:
        fit(made(), logger, Remove(), epochs=4)
    assert len([w for w in caught if "can't be written" in str(w.message)]) == 1
    assert {row.epoch for row in logger.rows} == {0, 1, 2, 3, 4}


def test_a_model_without_any_is_refused():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="has no batch normalization"):
        fit(model, keras_bn.StatisticsLogger(data()))


def scalars(folder):
    """What TensorBoard would read: {(tag, step): value}."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    return {
        (value.tag, event.step): float(make_ndarray(value.tensor))
        for file in sorted(folder.iterdir())
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "scalars"
    }


def test_events_for_tensorboard(tmp_path):
    require("tensorboard")
    model = made()
    logger = keras_bn.StatisticsLogger(data(), log_dir=tmp_path / "logs")
    seen = []
    spy = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(len(scalars(tmp_path / "logs")))
    )
    fit(model, logger, spy)
    assert seen == [12, 18], "they can be seen while training goes on"
    found = scalars(tmp_path / "logs")
    for row in logger.rows:
        for column, value in zip(DriftRow._fields[2:], row[2:], strict=True):
            tag = f"{column}/{row.layer}", row.epoch
            if np.isnan(value):
                assert tag not in found
            else:
                assert found.pop(tag) == pytest.approx(value, rel=1e-6)
    assert not found


def test_events_without_tensorboard_are_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    logger = keras_bn.StatisticsLogger(data(), log_dir=tmp_path / "logs")
    with pytest.raises(ImportError, match="`pip install tensorboard`"):
        fit(made(), logger)


def test_recalibrate_listed_before_it_leaves_nothing_to_record():
    callbacks = keras_bn.Recalibrate(data()), keras_bn.StatisticsLogger(data())
    with pytest.warns(UserWarning, match="fewer than 100"):
        fit(made(), *callbacks)
    drifts = {row.epoch: row.mean_drift for row in callbacks[1].rows if row[1] == "bn"}
    assert drifts[0] > 1
    assert drifts[1] < 1e-5
    assert drifts[2] < 1e-5


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="it draws the figure")
    logger = keras_bn.StatisticsLogger(data())
    with pytest.raises(ValueError, match="Nothing was recorded"):
        logger.plot()
    fit(made(), logger)
    figure = logger.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    mean, _, gap = figure.axes
    mine = [row for row in logger.rows if row.layer == "bn"]
    typical, worst = mean.get_lines()
    np.testing.assert_array_equal(typical.get_ydata(), [r.mean_drift for r in mine])
    np.testing.assert_array_equal(worst.get_ydata(), [r.worst_mean_drift for r in mine])
    output = gap.get_lines()[-1].get_ydata()
    assert output[-1] == logger.rows[-1].output_gap


def test_the_figure_of_many_layers():
    pytest.importorskip("matplotlib", reason="it draws the figure")
    logger = keras_bn.StatisticsLogger(data())
    logger.rows = [
        DriftRow(epoch, f"bn_{k}", 0.1, 0.2, 0.3, 0.4, 0.5)
        for epoch in range(2)
        for k in range(40)
    ] + [DriftRow(1, "model", *[float("nan")] * 4, 0.5)]
    figure = logger.plot()
    assert not figure.legends
    assert len(figure.axes) == 4, "a colour bar instead of names"


@pytest.mark.parametrize("outlier", [1e6, float("inf")])
def test_an_outlier_does_not_flatten_the_figure(outlier):
    pytest.importorskip("matplotlib", reason="it draws the figure")
    logger = keras_bn.StatisticsLogger(data())
    logger.rows = [
        DriftRow(epoch, "bn", 0.1, outlier, 0.3, -outlier, outlier if epoch else 0.5)
        for epoch in range(3)
    ] + [DriftRow(2, "model", *[float("nan")] * 4, outlier)]
    mean, ratio, gap = logger.plot().axes
    for axis, largest in ((mean, 5), (ratio, 20), (gap, 3)):
        low, high = axis.get_ylim()
        assert high < largest
        marks = np.concatenate([dots.get_offsets() for dots in axis.collections])
        assert len(marks) == 3
        assert (low <= marks[:, 1]).all()
        assert (marks[:, 1] <= high).all()


def test_options_that_are_set_during_fit_count():
    class Larger(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.get_layer("bn").epsilon = 50.0

    model = made()
    logger = keras_bn.StatisticsLogger(data())
    fit(model, Larger(), logger, epochs=2)
    gap = keras_bn.diagnose(model, data(), verbose=0).record.gap
    assert logger.rows[-1].output_gap == pytest.approx(gap, rel=1e-5)
