"""`keras-bn check`: fail a build if the normalizations of a model are not healthy."""

import sys
from pathlib import Path

from keras_bn.cli import output
from keras_bn.cli.diagnosing import add_options, as_in_file, diagnosed, ignored
from keras_bn.cli.errors import UsageError
from keras_bn.cli.formats import FORMATS, Checked, Unchecked
from keras_bn.cli.models import open_file, set_run
from keras_bn.diagnosis.rules import SEVERITIES, WARNING


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "check",
        help="fail if the batch normalizations of saved models are not healthy",
        description="Diagnose the batch normalizations of saved Keras models, without "
        "data as far as they show it themselves, and with --data completely. The exit "
        "status is 1 if something is found that is as severe as --fail-on, and 2 if a "
        "file cannot be checked; the others are.",
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="a .keras or .h5 file"
    )
    add_options(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="what to print: text, JSON, JUnit's XML, SARIF 2.1.0, or the commands of "
        "GitHub Actions (text)",
    )
    parser.add_argument(
        "--fail-on",
        choices=SEVERITIES,
        default=WARNING,
        help="the least severity that fails (warning)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write to a file instead of stdout"
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    set_run(parser, _run)


def _run(arguments):
    ignored(arguments)
    if arguments.output is not None:
        output.check(arguments, arguments.output)
    checked, unchecked = [], []
    for file in arguments.models:
        try:
            checked.append(Checked(file, _report(arguments, file)))
        except (UsageError, SystemExit) as error:  # the latter: no normalization in it
            unchecked.append(Unchecked(file, str(error)))
    written = FORMATS[arguments.format](checked, unchecked, arguments.fail_on)
    if arguments.output is None:
        print(written, end="")
    else:

        def write(path: Path):
            path.write_text(written, encoding="utf-8")

        output.write(arguments, arguments.output, write)
    if unchecked:
        return 2
    return int(any(each.report.at_least(arguments.fail_on) for each in checked))


def _report(arguments, file):
    opened = open_file(file)
    for note in opened.notes:
        print(f"{file}: {note}", file=sys.stderr)
    return diagnosed(arguments, as_in_file(opened), file)
