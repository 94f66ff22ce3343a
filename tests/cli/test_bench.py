"""`keras-bn bench`: what it times, prints and refuses."""

import pytest
from support.backend import NAME, but_on, only
from support.command_line import refused, run

from keras_bn.backends import modes, plan
from keras_bn.verify import Timing, chains

CALIBRATED = only("tensorflow", "elsewhere the kernel does not depend on the size")


def printed(capsys, *arguments):
    assert run("bench", *arguments) == 0
    return capsys.readouterr().out


def test_table(capsys, monkeypatch):
    monkeypatch.setattr(chains, "depth", lambda shape: 2)
    out = printed(capsys, "--shape", "8,4", "--shape", "6,5,3", "--seconds", "0.1")
    assert "(8, 4)" in out
    assert "(6, 5, 3)" in out


@CALIBRATED
def test_calibrate(capsys, monkeypatch):
    timing = Timing(16.0, 1.0, 1.0, 1)
    slower = {"plain": timing, "fused": timing._replace(median=32.0)}
    faster = {"plain": timing, "fused": timing._replace(median=8.0)}
    answers = iter([slower, faster, slower, slower, faster, faster, faster, faster])
    monkeypatch.setattr(chains, "interleave", lambda *_: next(answers))
    out = printed(capsys, "--calibrate")
    built_in = f"{plan.FUSED_FROM:,}"
    assert f"fused: faster from 262,144 elements here; built in: {built_in}" in out


@CALIBRATED
def test_calibrate_says_so_where_the_fused_kernel_never_wins(monkeypatch):
    timings = dict.fromkeys(("plain", "fused"), Timing(1.0, 1.0, 1.0, 1))
    monkeypatch.setattr(chains, "interleave", lambda *_: timings)
    rows, start = chains.crossover()
    assert [elements for elements, *_ in rows] == [2**power for power in range(14, 22)]
    assert start is None


@CALIBRATED
def test_calibrate_runs_the_kernel_it_names(monkeypatch):
    ran = []

    def forward(x, mask, gamma, beta, *, epsilon, plan):
        ran.append(plan.kernel)
        return x, None

    def interleave(functions, seconds):
        for name, function in functions.items():
            ran.clear()
            function()
            assert set(ran) == {name}
        return dict.fromkeys(functions, Timing(1.0, 1.0, 1.0, 1))

    monkeypatch.setattr(chains.backends, "forward", forward)
    monkeypatch.setattr(chains, "interleave", interleave)
    chains.crossover()


@but_on("tensorflow", "its kernel depends on the size")
def test_calibrate_is_refused_where_the_kernel_does_not_depend_on_the_size(capsys):
    said = refused(capsys, "bench", "--calibrate", "--seconds", 0)
    assert said.endswith(f"on the size of the input here, on {NAME}")


@pytest.mark.parametrize("shape", ["8", "8,0", "a,b", ""])
def test_bad_shapes_are_refused(capsys, shape):
    said = refused(capsys, "bench", "--shape", shape)
    assert "two or more positive ints" in said


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_that_a_shape_has_not_is_refused(capsys, axis):
    said = refused(capsys, "bench", "--shape", "8,4", "--axis", axis, "--seconds", 0)
    assert f"--axis {axis} is no axis of (8, 4)" in said


@pytest.mark.parametrize("seconds", [-1, "nan", "inf", "long"])
def test_bad_times_are_refused(capsys, seconds):
    said = refused(capsys, "bench", "--seconds", seconds)
    assert f"must be a number, 0 or greater, not '{seconds}'" in said


@pytest.mark.parametrize("mode", ["tf.function", "jit_compile", "GRAPH"])
def test_modes_are_those_of_the_backend(capsys, mode):
    said = refused(capsys, "bench", "--mode", mode, "--seconds", 0)
    assert "argument --mode: invalid choice" in said
    assert all(f"'{name}'" in said for name in modes.MODES)


def test_more_memory_than_there_is_is_refused(capsys, monkeypatch):
    def chain(*arguments):
        raise MemoryError("Unable to allocate 3 TiB\nfor an array")

    monkeypatch.setattr(chains, "chain", chain)
    said = refused(capsys, "bench", "--shape", "8,4")
    assert said.endswith("(8, 4) can't be timed: Unable to allocate 3 TiB")
