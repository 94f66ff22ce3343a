"""The command line: `keras-bn` and `python -m keras_bn`."""

import importlib
import io
import os
import sys

from keras_bn.cli.arguments import parser
from keras_bn.cli.checks import check, needs_keras
from keras_bn.cli.config import configuration
from keras_bn.cli.errors import UsageError
from keras_bn.pages.plain import escaped, sentence


def main(argv=None) -> int:
    """Run the command line.

    Args:
        argv: list of arguments; those of the process by default.

    Returns:
        The exit status: 0 for success, 1 for a negative result, 2 if `check` cannot
        check one of its files, 130 after Ctrl-C.

    Raises:
        SystemExit: 2 for invalid arguments, unreadable files or unsuitable data, 1 for
            a model without batch normalization, 0 after `--help` and `--version`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it can't encode is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    line = parser()
    _complete(line)
    arguments = line.parse_args(argv)
    try:
        if arguments.command in ("check", "inspect"):
            arguments.parser.set_defaults(**configuration())
            arguments = line.parse_args(argv)
        check(arguments)
        status = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UsageError as error:
        _complain(arguments, error)
        raise SystemExit(2) from error
    except OSError as error:
        if error.filename is not None:
            raise
        # It is stdout. What is still to be printed would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # who reads has enough, as `head` has
            return 1
        _complain(arguments, f"stdout can't be written: {sentence(error)}")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print(f"{arguments.parser.prog}: interrupted", file=sys.stderr)
        return 130


def _complain(arguments, message):
    print(f"{arguments.parser.prog}: error: {escaped(message)}", file=sys.stderr)


def _complete(line):
    """Answer a shell that asks how a command line goes on, and end the process."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(line)


def _run(arguments):
    """Import what the command needs, and run it."""
    command = arguments.command.replace("-", "_")
    if not needs_keras(arguments):
        return importlib.import_module(f"keras_bn.cli.{command}").run(arguments)

    from keras_bn.cli import process

    process.import_keras(arguments.parser.prog)

    from keras_bn.cli.modules import imported

    module = importlib.import_module(f"keras_bn.cli.{command}")
    modules = imported(getattr(arguments, "modules", []))
    with process.terminable(), process.errors_alone(), modules:
        return module.run(arguments)
