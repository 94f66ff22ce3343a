"""The benchmarks run, and measure what they say."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
from distributed import strategy_of

import keras_bn
from keras_bn import bench
from keras_bn.kernels import dispatch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bandwidth, layer, models, peers, sync

SHAPE = (8, 4)


def test_interleave_tells_slow_from_fast():
    def slow():
        return sum(range(20_000))

    timings = bench.interleave({"slow": slow, "fast": lambda: None}, seconds=0.05)
    assert timings["slow"].median > 3 * timings["fast"].median
    for timing in timings.values():
        assert timing.low <= timing.median <= timing.high
        assert timing.rounds >= 7


@pytest.mark.parametrize("training", [True, False])
def test_every_peer_takes_its_step(training):
    functions = peers.functions(SHAPE, training=training)
    assert {bench.PEER, bench.OURS} <= set(functions)
    for function in functions.values():
        function()


def test_a_row_of_the_layer_table():
    row = layer.measure(SHAPE, seconds=0.01)
    ms = row["ms"]
    assert row["ratio"] == ms["Keras"]["median"] / ms["keras_bn"]["median"]
    assert "(8, 4)" in layer.table([row])
    assert row["of_copy_bandwidth"] > 0


def test_a_row_of_the_synchronization_table():
    row = sync.measure(strategy_of("mirrored 2"), SHAPE, seconds=0.01)
    ms = row["ms"]
    for name in ("Keras", "keras_bn"):
        cost = ms[f"{name}, together"]["median"] - ms[f"{name}, apart"]["median"]
        assert row[f"{name}, cost"] == cost
    assert "(8, 4)" in sync.table([row])


def test_synchronized_replicas_are_measured_synchronized():
    strategy = strategy_of("mirrored 2")
    layers = []

    def make():
        layers.append(keras_bn.BatchNormalization(synchronized=True, momentum=0.0))
        return layers[-1]

    sync.chain(strategy, make, SHAPE)()
    assert len(layers) == bench.depth(SHAPE)
    rows = np.random.default_rng(0).normal(size=(2 * SHAPE[0], *SHAPE[1:]))
    np.testing.assert_allclose(layers[0].moving_variance.numpy(), rows.var(0), 1e-5)


def test_bandwidth_counts_the_bytes():
    assert bandwidth.step_rate((1000, 1000), 36.0) == pytest.approx(1e9)


@pytest.mark.parametrize(("kind", "weights"), [("Keras", 4), ("without", 0)])
def test_models_lose_nothing_but_their_normalization(kind, weights):
    model = models.build("MobileNetV2", 32, kind)
    names = [w.name for w in model.weights]
    assert bool(names.count("moving_mean")) == bool(weights)


def run(capsys, *argv):
    parser = argparse.ArgumentParser()
    bench.add_bench(parser.add_subparsers())
    arguments = parser.parse_args(["bench", *argv])
    assert arguments.run(arguments) == 0
    return capsys.readouterr().out


def test_command(capsys):
    out = run(capsys, "--shape", "8,4", "--shape", "6,5,3", "--seconds", "0.1")
    assert "(8, 4)" in out
    assert "(6, 5, 3)" in out


def test_calibrate(capsys, monkeypatch):
    timing = bench.Timing(16.0, 1.0, 1.0, 1)
    slower = {"False": timing, "True": timing._replace(median=32.0)}
    faster = {"False": timing, "True": timing._replace(median=8.0)}
    fused = [slower, faster, slower, slower, faster, faster, faster, faster]
    strips = [slower] * 7
    answers = iter(fused + strips)
    monkeypatch.setattr(bench, "interleave", lambda *_: next(answers))
    monkeypatch.setattr(bench, "chain", lambda *_: lambda: None)
    out = run(capsys, "--calibrate")
    assert "fused: faster from 262,144 elements here; built in: 131,072" in out
    assert "strips: faster from none here; built in: 131,072" in out


def test_calibrate_takes_both_sides_of_a_threshold(monkeypatch):
    seen = []

    def chain(make, shape, mode):
        small, large = dispatch.by_strips((1, 1), 1), dispatch.by_strips((2**30, 1), 1)
        seen.append((mode, small, large))
        return lambda: None

    timing = bench.Timing(1.0, 1.0, 1.0, 1)
    monkeypatch.setattr(bench, "chain", chain)
    monkeypatch.setattr(bench, "interleave", lambda f, _: dict.fromkeys(f, timing))
    bench.crossover("strips")
    sides = {("jit_compile", False, False), ("jit_compile", True, True)}
    assert set(seen) == sides


@pytest.mark.parametrize("shape", ["8", "8,0", "a,b", ""])
def test_bad_shapes_are_refused(capsys, shape):
    with pytest.raises(SystemExit):
        run(capsys, "--shape", shape)
    assert "two or more positive ints" in capsys.readouterr().err
