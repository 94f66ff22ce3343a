"""`keras-bn bench`: what it times, prints and refuses."""

import pytest
from support.command_line import refused, run

from keras_bn.backends import modes


def printed(capsys, *arguments):
    assert run("bench", *arguments) == 0
    return capsys.readouterr().out


def test_table(capsys):
    out = printed(capsys, "--shape", "8,4", "--shape", "6,5,3", "--seconds", "0.1")
    assert "(8, 4)" in out
    assert "(6, 5, 3)" in out


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


def test_more_memory_than_there_is_is_refused(capsys):
    """8 PiB are more than any process can address."""
    shape = 2**25, 2**25
    message = refused(capsys, "bench", "--shape", ",".join(map(str, shape)))
    assert f"{shape} can't be timed: Unable to allocate 8.00 PiB" in message
