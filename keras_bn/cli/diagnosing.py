"""Diagnosing the model of a file: options, data, the report."""

from dataclasses import replace

import numpy as np
from keras import tree

from keras_bn.cli.data import read_data
from keras_bn.cli.errors import UsageError, noted, refused
from keras_bn.cli.options import at_least
from keras_bn.diagnosis.diagnose import diagnose
from keras_bn.diagnosis.rules import ignored_kinds
from keras_bn.tools.convert import to_keras


def add_options(parser):
    """Add `--data`, `--batch-size` and `--ignore`."""
    parser.add_argument(
        "--data",
        metavar="FILE.npz",
        help="the inputs: one array, or x, or arrays named as the inputs of the model; "
        "with labels as y, it compares loss and accuracy, too",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=at_least(1),
        default=32,
        help="as in training; the samples are shuffled (32)",
    )
    parser.add_argument(
        "--ignore",
        metavar="RULE",
        action="append",
        default=[],
        help="a finding to leave out, such as BN007 or small-gamma; may be repeated, "
        "or a list with commas",
    )


def ignored(arguments):
    """The names that `--ignore` gives, checked."""
    names = [
        name.strip() for given in arguments.ignore for name in given.split(",") if name
    ]
    try:
        ignored_kinds(names)
    except ValueError as error:
        raise UsageError(f"--ignore: {error}") from error
    return names


def as_in_file(opened):
    """The model with the layers of its file, so that the remedies fit them.

    Args:
        opened: the `Opened` model, which has layers of ours.
    """
    if not opened.native:
        return opened.model
    with refused(TypeError, ValueError):
        return to_keras(opened.model)


def diagnosed(arguments, model, file):
    """The report on a model, as the options of the command say."""
    ignore = ignored(arguments)
    if arguments.data is None:
        with noted():
            return _of_files(diagnose(model, ignore=ignore), file, None)
    inputs, labels = read_data(arguments.data, model)
    order = np.random.default_rng(0).permutation(len(tree.flatten(inputs)[0]))
    data = tree.map_structure(lambda array: array[order], inputs)
    if labels is not None:
        data = (data, labels[order])
    with run_on(arguments.data), noted():
        report = diagnose(model, data, batch_size=arguments.batch_size, ignore=ignore)
        return _of_files(report, file, arguments.data)


def _of_files(report, file, data):
    """The report with the files that it is about."""
    return replace(report, origin=report.origin._replace(file=file, data=data))


def run_on(file):
    """Whatever a model raises for the data of a file becomes one sentence."""
    return refused(Exception, saying=f"the model can't be run on {file}: ")
