"""The arguments of all commands. Parsing them needs neither Keras nor its backend."""

import argparse
import math

from keras_bn.diagnosis.rules import SEVERITIES, WARNING
from keras_bn.version import __version__

MODEL_SUFFIXES = (".keras", ".h5")
FORMATS = ("text", "json", "junit", "sarif", "github")
BATCH_SIZE = 32


def parser():
    """The parser of the command line.

    Its result holds `command`, the name of the command, and `parser`, that of its
    arguments.
    """
    line = argparse.ArgumentParser(
        prog="keras-bn", description="Batch normalization for Keras 3."
    )
    line.add_argument("--version", action="version", version=f"keras_bn {__version__}")
    commands = line.add_subparsers(metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return line


def _command(commands, name, summary, description):
    command = commands.add_parser(name, help=summary, description=description)
    command.set_defaults(command=name, parser=command)
    return command


def _verify(commands):
    command = _command(
        commands,
        "verify",
        "prove on this machine that the layer computes what Keras's does",
        "Compare keras_bn.BatchNormalization with Keras's layer on this machine and "
        "device: outputs, gradients and moving statistics over shapes, dtypes and "
        "modes, against float64 NumPy. The exit status is 1 if any comparison fails.",
    )
    command.add_argument("--quick", action="store_true", help="fewer combinations")
    command.add_argument(
        "--seed", type=at_least(0), default=0, help="seed of the random numbers (0)"
    )
    _quiet(command)
    _json(command)


def _bench(commands):
    command = _command(
        commands,
        "bench",
        "time the layer beside Keras's on this machine",
        "Time training steps of a chain of layers, keras_bn's and Keras's in turn, and "
        "print milliseconds per layer and the ratio of the medians.",
    )
    command.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="N,...,C",
        help="input shape, such as 32,56,56,64; may be repeated",
    )
    command.add_argument("--axis", type=int, default=-1, help="channel axis (-1)")
    command.add_argument(
        "--mode",
        choices=("eager", "graph", "xla"),
        help="how to run it; the default is what `fit` does on Keras's backend",
    )
    command.add_argument(
        "--inference", action="store_true", help="inference instead of training"
    )
    command.add_argument(
        "--seconds",
        type=at_least(0, float),
        default=60.0,
        help="total time to measure (60)",
    )


def _inspect(commands):
    command = _on_model(
        commands,
        "inspect",
        "list the batch normalizations of a saved model, and diagnose them",
        "List the batch normalizations of a saved Keras model: their options, the "
        "state of their statistics, and where `keras-bn fold` would put them. Report "
        "what is wrong with them and how to fix it: without --data, as far as the "
        "model itself shows it. With --data, the exit status is 1 if there are errors "
        "or warnings.",
    )
    _diagnosis(command)
    command.add_argument(
        "--fix",
        metavar="OUT.keras",
        help="apply the remedies that change statistics only, and write the model; "
        "the report then also describes the repaired model",
    )
    command.add_argument("--plot", metavar="OUT.png", help="draw the diagnosis")
    command.add_argument(
        "--html", metavar="OUT.html", help="write the diagnosis as a page"
    )


def _check(commands):
    command = _command(
        commands,
        "check",
        "fail if the batch normalizations of saved models are not healthy",
        "Diagnose the batch normalizations of saved Keras models: without --data, as "
        "far as the models themselves show it. Exit status: 1 if a finding is at least "
        "as severe as --fail-on, 2 if a file could not be checked. The other files are "
        "still checked.",
    )
    command.add_argument(
        "models", metavar="MODEL", nargs="+", help="a .keras or .h5 file"
    )
    _quiet(command)
    _diagnosis(command)
    command.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="what to print: text, JSON, JUnit XML, SARIF 2.1.0, or the commands of "
        "GitHub Actions (text)",
    )
    command.add_argument(
        "--fail-on",
        choices=SEVERITIES,
        default=WARNING,
        help="the least severity that fails (warning)",
    )
    command.add_argument(
        "--output", metavar="FILE", help="write to a file instead of stdout"
    )
    _force(command)
    _import(command)


def _rule(commands):
    command = _command(
        commands,
        "rule",
        "print what a rule finds, and what helps",
        "Print the text of rules: what each finds, how severe it is, and what helps.",
    )
    command.add_argument(
        "rules", metavar="RULE", nargs="*", help="such as BN004 or frozen (all)"
    )


def _convert(commands):
    command = _to_file(
        commands,
        "convert",
        "replace Keras's batch normalizations by those of keras_bn, or back",
        "Replace every batch normalization of a model saved by Keras 3 or Keras 2 by "
        "keras_bn's. Weights, names and training state are kept.",
    )
    command.add_argument(
        "--to",
        choices=("keras_bn", "keras"),
        default="keras_bn",
        help="whose layers to use (keras_bn)",
    )


# The largest difference of outputs before and after folding, relative to their spread.
# Above it, something is wrong.
FOLD_TOLERANCE = 1e-4


def _fold(commands):
    _to_file(
        commands,
        "fold",
        "fold batch normalizations into the layers next to them, for inference",
        "Write a model for inference in which the batch normalizations are folded into "
        "the weights of the layers next to them. Both models are compared on random "
        f"input; if they differ by more than {FOLD_TOLERANCE:g} of the spread of the "
        "outputs, nothing is written and the exit status is 1.",
    )


def _recalibrate(commands):
    command = _to_file(
        commands,
        "recalibrate",
        "replace the moving statistics by those of your data",
        "Run data through a model and replace the moving statistics of its batch "
        "normalizations by those of the data, pooled over all batches.",
    )
    _data(command, "samples at once", required=True)
    command.add_argument(
        "--exact",
        action="store_true",
        help="layer by layer, as if the data were one batch; one pass for each layer",
    )
    command.add_argument(
        "--prior",
        metavar="N",
        type=at_least(0, float),
        default=0,
        help="how many samples the present statistics count for (0)",
    )
    command.add_argument(
        "--include-frozen", action="store_true", help="change frozen layers, too"
    )


def _export_int8(commands):
    command = _to_file(
        commands,
        "export-int8",
        "write a .tflite or .onnx file that computes with integers alone",
        "Fold the batch normalizations, quantize the model with ranges measured on "
        "your data, and write it as a .tflite file without an operation in floats, or "
        "as an .onnx file of the same integers. "
        "The file is compared with the model on the data: if an output differs by more "
        "than --tolerance, nothing is written and the exit status is 1. It needs "
        "Keras's TensorFlow backend: KERAS_BACKEND=tensorflow.",
        suffixes=(".tflite", ".onnx"),
    )
    _data(
        command,
        "samples in a step",
        more="; a model from quantize_aware needs none",
    )
    command.add_argument(
        "--tolerance",
        metavar="X",
        type=at_least(0, float),
        default=0.1,
        help="the largest error of an output: root mean square over standard deviation "
        "(0.1)",
    )
    command.add_argument(
        "--equalize",
        action="store_true",
        help="equalize the ranges of the channels of neighbouring layers",
    )
    command.add_argument(
        "--correct-bias",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="round weights so that their errors make up for each other (yes)",
    )
    command.add_argument(
        "--activations",
        type=int,
        choices=(8, 16),
        default=8,
        help="bits of the activations (8)",
    )
    command.add_argument(
        "--keep-float",
        metavar="NAME",
        action="append",
        default=[],
        help="a layer, or a pattern of layers, that stays in floats; with "
        "--activations 16, where TFLite has no integers for it; may be given several "
        "times",
    )
    command.add_argument(
        "--lose",
        metavar="X",
        type=at_least(0, float),
        help="keep layers in floats until the accuracy on the labels in --data is at "
        "most X below that of the model",
    )
    command.add_argument(
        "--symmetric",
        action="store_true",
        help="in an .onnx file, activations of int8 with a zero point of 0",
    )


_COMMANDS = (
    _verify,
    _bench,
    _inspect,
    _check,
    _rule,
    _convert,
    _fold,
    _recalibrate,
    _export_int8,
)


def _on_model(commands, name, summary, description, metavar="MODEL"):
    """A command on one model file."""
    command = _command(commands, name, summary, description)
    command.add_argument("model", metavar=metavar, help="a .keras or .h5 file")
    _quiet(command)
    _json(command)
    _import(command)
    return command


def _to_file(commands, name, summary, description, suffixes=MODEL_SUFFIXES):
    """A command that reads a model file and writes another file."""
    command = _on_model(commands, name, summary, description, metavar="IN")
    command.add_argument("output", metavar="OUT", help="the file to write")
    command.set_defaults(suffixes=suffixes)
    return command


def _data(command, batch_size, required=False, more=""):
    """The data of a command, and how much of it to take."""
    command.add_argument(
        "--data",
        metavar="DATA",
        required=required,
        help="an .npz file with x or x_train, or with arrays named as the inputs of "
        "the model, and labels as y or y_train; an .npy file; a folder of images, one "
        "folder for each class; a folder of tf.data.Dataset.save; or module:function, "
        f"which returns anything that fit takes{more}",
    )
    command.add_argument("--x", metavar="NAME", help="the array of the inputs")
    command.add_argument("--y", metavar="NAME", help="the array of the labels")
    command.add_argument(
        "--batch-size",
        metavar="N",
        type=at_least(1),
        default=BATCH_SIZE,
        help=f"{batch_size} ({BATCH_SIZE})",
    )
    command.add_argument(
        "--steps", metavar="N", type=at_least(1), help="how many batches to take (all)"
    )


def _diagnosis(command):
    _data(
        command,
        "as in training; samples in arrays are shuffled",
        more="; with labels, loss and accuracy are compared, too",
    )
    for option, what in (("--ignore", "leave out"), ("--select", "look at alone")):
        command.add_argument(
            option,
            metavar="RULE",
            action="append",
            default=[],
            help=f"a rule to {what}, such as BN007 or small-gamma; may be repeated, or "
            "a list with commas",
        )
    command.add_argument(
        "--exit-zero",
        action="store_true",
        help="exit with status 0 whatever is found, unless something fails",
    )


def _quiet(command):
    command.add_argument(
        "-q", "--quiet", action="store_true", help="print errors alone"
    )


def _json(command):
    command.add_argument(
        "--json", metavar="FILE", help='write the results to a file; "-" for stdout'
    )
    _force(command)


def _force(command):
    command.add_argument(
        "--force", action="store_true", help="overwrite existing files"
    )


def _import(command):
    command.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import this module first, for the classes that the model needs; it may "
        "be in the current folder; may be repeated",
    )


def at_least(least, kind=int):
    """The type of an option that takes a finite number, `least` or greater.

    Args:
        least: the smallest number.
        kind: int or float.

    >>> at_least(1)("32"), at_least(0, float)("0.5")
    (32, 0.5)
    """

    def parse(text):
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"must be {what}, {least} or greater, not {text!r}"
            )
        return number

    return parse


def _shape(text):
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"must be two or more positive ints, such as 32,56,56,64, not {text!r}"
        )
    return shape
