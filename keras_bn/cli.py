"""The command line: `keras-bn` and `python -m keras_bn`.

Each command is one function, which adds the command's arguments and says what to run.
What takes long to import is imported when a command runs.
"""

import argparse
import contextlib
import json
import logging
import os

from keras_bn.bench import add_bench
from keras_bn.diagnosis.command import add_inspect
from keras_bn.tools import files
from keras_bn.tools.commands import ADD
from keras_bn.version import __version__


def main(argv=None) -> int:
    """Run the command line.

    Args:
        argv: list of arguments; those of the process by default.

    Returns:
        The exit status: 0 for success, 1 for a negative result, 130 if interrupted.

    Raises:
        SystemExit: with status 2 for usage errors, 0 after `--help` and `--version`.
    """
    parser = argparse.ArgumentParser(
        prog="keras-bn", description="Batch normalization for Keras 3 on TensorFlow."
    )
    parser.add_argument(
        "--version", action="version", version=f"keras_bn {__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_verify, add_bench, add_inspect, *ADD):
        add(commands)
    arguments = parser.parse_args(argv)
    _silence_tensorflow()
    try:
        return arguments.run(arguments)
    except UsageError as error:
        return arguments.parser.error(str(error))
    except KeyboardInterrupt:
        return 130


class UsageError(Exception):
    """The arguments ask for what can't be done."""


def _add_verify(commands):
    parser = commands.add_parser(
        "verify",
        help="prove on this machine that the layer computes what Keras's does",
        description="Compare keras_bn.BatchNormalization with Keras's layer on this "
        "machine and device: outputs, gradients and moving statistics over shapes, "
        "dtypes and modes, against float64 NumPy. The exit status is 1 if any "
        "comparison fails.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer combinations")
    parser.add_argument(
        "--seed", type=_not_negative, default=0, help="of the random numbers (0)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help='write the results to a file; "-" for stdout'
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite an existing FILE"
    )

    def run(arguments):
        if arguments.json not in (None, "-"):
            with _file_errors():
                files.check_writable(arguments.json, arguments.force)

        from rich.console import Console
        from rich.progress import track

        from keras_bn import verify, verify_table

        console = Console(stderr=arguments.json == "-", highlight=False)
        environment = verify.environment()
        console.print(verify_table.title(environment))
        settings, progress = verify.cases(arguments.quick), Console(stderr=True)
        running = track(
            verify.verify(settings, arguments.seed),
            "Comparing",
            total=len(settings),
            console=progress,
            transient=True,
            disable=not progress.is_terminal,
        )
        records = list(running)
        passed = verify.passed(records)
        console.print(verify_table.table(records))
        console.out(f"\n{verify_table.RULE}\n{verify_table.verdict(records, passed)}")
        if arguments.json is not None:
            results = {
                "environment": environment,
                "seed": arguments.seed,
                "passed": passed,
                "records": [record.to_dict() for record in records],
            }
            text = json.dumps(results, indent=1, allow_nan=False) + "\n"
            if arguments.json == "-":
                print(text, end="")
            else:
                with _file_errors():
                    files.write_whole(
                        arguments.json,
                        lambda path: path.write_text(text, encoding="utf-8"),
                        arguments.force,
                    )
        return 0 if passed else 1

    parser.set_defaults(run=run, parser=parser)


def _not_negative(text):
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or greater, not {number}")
    return number


@contextlib.contextmanager
def _file_errors():
    """What is wrong with a file was asked for wrongly."""
    try:
        yield
    except OSError as error:
        raise UsageError(str(error)) from error


def _silence_tensorflow():
    """Keep TensorFlow's start-up notices out of the command's output."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
