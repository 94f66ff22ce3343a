"""`keras-bn check`: fail a build if the normalizations of a model are not healthy."""

import sys
from pathlib import Path

from keras_bn.cli.checks import check_file
from keras_bn.cli.errors import UsageError
from keras_bn.cli.formats import FORMATS, Checked, Unchecked
from keras_bn.pages.plain import escaped


def run(arguments):
    checked, unchecked = [], []
    for file in arguments.models:
        try:
            checked.append(_checked(arguments, file))
        except (UsageError, SystemExit) as error:  # the latter: no normalization in it
            unchecked.append(Unchecked(file, str(error)))
    form = FORMATS[arguments.format]
    written = form(checked, unchecked, arguments.fail_on, arguments.quiet)
    if arguments.output is None:
        print(written, end="")
    else:
        from keras_bn.cli import output

        def write(path: Path):
            path.write_text(written, encoding="utf-8")

        output.write(arguments, arguments.output, write)
    if unchecked:
        return 2
    failed = any(file.report.at_least(arguments.fail_on) for file in checked)
    return int(failed and not arguments.exit_zero)


def _checked(arguments, file):
    check_file(file)

    # A build without the files that it names need not wait for Keras.
    from keras_bn.cli.diagnosing import as_in_file, commands, diagnosed
    from keras_bn.cli.models import open_file

    opened = open_file(file)
    for note in opened.notes if not arguments.quiet else ():
        print(escaped(f"{file}: {note}"), file=sys.stderr)
    report = diagnosed(arguments, as_in_file(opened), file)
    return Checked(file, report, commands(arguments, file))
