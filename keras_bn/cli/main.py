"""The command line: `keras-bn` and `python -m keras_bn`."""

import argparse
import contextlib
import logging

from keras_bn.cli import (
    bench,
    check,
    convert,
    export_int8,
    fold,
    inspect,
    recalibrate,
    verify,
)
from keras_bn.cli.errors import UsageError
from keras_bn.version import __version__

COMMANDS = (
    verify,
    bench,
    inspect,
    check,
    convert,
    fold,
    recalibrate,
    export_int8,
)


def main(argv=None) -> int:
    """Run the command line.

    Args:
        argv: list of arguments; those of the process by default.

    Returns:
        The exit status: 0 for success, 1 for a negative result, 2 if `check` cannot
        check one of its files, 130 if interrupted.

    Raises:
        SystemExit: with status 2 for what cannot be done as it was asked for, 1 for a
            model without batch normalization, 0 after `--help` and `--version`.
    """
    parser = argparse.ArgumentParser(
        prog="keras-bn", description="Batch normalization for Keras 3."
    )
    parser.add_argument(
        "--version", action="version", version=f"keras_bn {__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    arguments = parser.parse_args(argv)
    try:
        with _errors_alone():
            return arguments.run(arguments)
    except UsageError as error:
        return arguments.parser.error(str(error))
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _errors_alone():
    """Drop what TensorFlow and Keras log that is no error.

    Keras logs through absl, such as that the format of a file is old.
    """
    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
