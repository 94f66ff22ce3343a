"""`keras-bn check`: fail a build if the normalizations of a model are not healthy."""

import sys
from pathlib import Path

from keras_bn.cli.errors import UsageError
from keras_bn.cli.formats import FORMATS, Checked, Unchecked


def run(arguments):
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
        from keras_bn.cli import output

        def write(path: Path):
            path.write_text(written, encoding="utf-8")

        output.write(arguments, arguments.output, write)
    if unchecked:
        return 2
    return int(any(each.report.at_least(arguments.fail_on) for each in checked))


def _report(arguments, file):
    if not Path(file).exists():
        raise UsageError(f"there is no file {file}")

    # A build without the files that it names need not wait for Keras.
    from keras_bn.cli.diagnosing import as_in_file, diagnosed
    from keras_bn.cli.models import open_file

    opened = open_file(file)
    for note in opened.notes:
        print(f"{file}: {note}", file=sys.stderr)
    return diagnosed(arguments, as_in_file(opened), file)
