"""Diagnosing the model of a file."""

from dataclasses import replace

import numpy as np
from keras import tree

from keras_bn.cli.checks import ignored
from keras_bn.cli.data import read_data
from keras_bn.cli.errors import noted, refused
from keras_bn.diagnosis.diagnose import diagnose
from keras_bn.tools.convert import to_keras


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
