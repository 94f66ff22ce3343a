"""Runs the command line in this process."""

import pytest

from keras_bn.cli import main


def run(*arguments):
    """The exit status."""
    return main.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """What stderr says, in one line; the exit status must be 2."""
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2
    return " ".join(capsys.readouterr().err.split())
