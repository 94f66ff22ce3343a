"""The command line: `keras-bn` and `python -m keras_bn`."""

import importlib
import os
import sys

from keras_bn.cli.arguments import parser
from keras_bn.cli.checks import check, needs_keras
from keras_bn.cli.config import configuration
from keras_bn.cli.errors import UsageError
from keras_bn.pages.plain import escaped


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
    line = parser()
    _complete(line)
    arguments = line.parse_args(argv)
    try:
        if arguments.command in ("check", "inspect"):
            arguments.parser.set_defaults(**configuration())
            arguments = line.parse_args(argv)
        check(arguments)
        return _run(arguments)
    except UsageError as error:
        message = f"{arguments.parser.prog}: error: {escaped(error)}"
        print(message, file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print(f"{arguments.parser.prog}: interrupted", file=sys.stderr)
        return 130


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
