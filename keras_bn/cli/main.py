"""The command line: `keras-bn` and `python -m keras_bn`."""

import importlib
import sys

from keras_bn.cli.arguments import parser
from keras_bn.cli.checks import check, needs_keras
from keras_bn.cli.errors import UsageError


def main(argv=None) -> int:
    """Run the command line.

    Args:
        argv: list of arguments; those of the process by default.

    Returns:
        The exit status: 0 for success, 1 for a negative result, 2 if `check` cannot
        check one of its files, 130 if interrupted.

    Raises:
        SystemExit: 2 for invalid arguments, unreadable files or unsuitable data, 1 for
            a model without batch normalization, 0 after `--help` and `--version`.
    """
    arguments = parser().parse_args(argv)
    try:
        check(arguments)
        return _run(arguments)
    except UsageError as error:
        print(f"{arguments.parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print(f"{arguments.parser.prog}: interrupted", file=sys.stderr)
        return 130


def _run(arguments):
    """Import what the command needs, and run it."""
    command = arguments.command.replace("-", "_")
    if not needs_keras(arguments):
        return importlib.import_module(f"keras_bn.cli.{command}").run(arguments)

    from keras_bn.cli import quiet

    quiet.import_keras(arguments.parser.prog)

    from keras_bn.cli.modules import imported

    module = importlib.import_module(f"keras_bn.cli.{command}")
    with quiet.errors_alone(), imported(getattr(arguments, "modules", [])):
        return module.run(arguments)
