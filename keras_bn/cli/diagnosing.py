"""Diagnosing the model of a file."""

import shlex
from dataclasses import replace

from keras_bn.cli.arguments import BATCH_SIZE
from keras_bn.cli.data import passing, read_data
from keras_bn.cli.errors import refused, warning_texts
from keras_bn.cli.rule import rules
from keras_bn.diagnosis.diagnose import diagnose
from keras_bn.tools.convert import to_keras

# Options about what is read, with what they are where nobody gives them.
_READ = {"x": None, "y": None, "batch-size": BATCH_SIZE, "steps": None}


def as_in_file(opened):
    """The model with the layers of its file, so that the remedies fit them.

    Args:
        opened: the `Opened` model, which has `keras_bn` layers.
    """
    if not opened.native:
        return opened.model
    with refused(TypeError, ValueError):
        return to_keras(opened.model)


def diagnosed(arguments, model, file):
    """The report on a model, as the options of the command say."""
    ignore = rules(arguments.ignore, "--ignore")
    if arguments.data is None:
        with warning_texts():
            report = diagnose(model, ignore=ignore)
        return _selected(arguments, _of_files(report, file, None))
    data = read_data(arguments, model).shuffled()
    with passing(arguments, data) as options, warning_texts():
        report = diagnose(model, data.whole(), ignore=ignore, **options)
    return _selected(arguments, _of_files(report, file, arguments.data))


def _selected(arguments, report):
    """The report with the findings that `--select` names, if it names any."""
    if not (kinds := rules(arguments.select, "--select")):
        return report
    lists = {
        name: [finding for finding in getattr(report, name) if finding.kind in kinds]
        for name in ("findings", "ignored")
    }
    return replace(report, **lists)


def commands(arguments, file):
    """A function of a `Finding`: the command that fixes it in a file, or None.

    Args:
        arguments: of the command.
        file: the file of the model.
    """
    words = ["keras-bn", "recalibrate", file, "OUT.keras"]
    words += ["--data", arguments.data or "DATA"]
    # What is read, and how much of it at once, is as in the diagnosis.
    for option, default in _READ.items():
        value = getattr(arguments, option.replace("-", "_"))
        if arguments.data is not None and value != default:
            words += [f"--{option}", str(value)]
    for module in arguments.modules:
        words += ["--import", module]

    def command(finding):
        if finding.tool != "recalibrate":
            return None
        frozen = ["--include-frozen"] * finding.fix.include_frozen
        return shlex.join([*words, *frozen])

    return command


def _of_files(report, file, data):
    """The report with the files that it is about."""
    return replace(report, origin=report.origin._replace(file=file, data=data))
