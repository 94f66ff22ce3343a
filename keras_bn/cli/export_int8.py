"""`keras-bn export-int8`: a file of integers for TFLite, checked against float."""

from keras_bn.cli import output
from keras_bn.cli.data import read_data
from keras_bn.cli.errors import noted, refused
from keras_bn.cli.models import add_command, open_model
from keras_bn.cli.options import at_least
from keras_bn.cli.output import show
from keras_bn.int8 import tflite
from keras_bn.int8.export import integer_file
from keras_bn.int8.report import HEADER


def add(commands):
    """Add the command."""
    parser = add_command(
        commands,
        "export-int8",
        "write a .tflite file that computes with integers alone",
        "Fold the batch normalizations, quantize the model with ranges measured on "
        "your data, and write it as a .tflite file without an operation in floats. "
        "The file is compared with the model on the data: if an output differs by more "
        "than --tolerance, nothing is written and the exit status is 1. It needs "
        "Keras's TensorFlow backend: KERAS_BACKEND=tensorflow.",
        _run,
        output=True,
    )
    parser.add_argument(
        "--data",
        metavar="FILE.npz",
        help="the inputs: one array, or arrays named as the inputs of the model; a "
        "model from quantize_aware needs none",
    )
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=at_least(0, float),
        default=0.1,
        help="the largest error of an output: root mean square over standard deviation "
        "(0.1)",
    )
    parser.add_argument(
        "--equalize",
        action="store_true",
        help="equalize the ranges of the channels of neighbouring layers",
    )
    parser.add_argument(
        "--correct-bias",
        action="store_true",
        help="correct biases for the mean error of rounding the weights",
    )


def _run(arguments):
    with refused(RuntimeError):
        tflite.check_backend("export-int8")
    model, _, _, notes = open_model(arguments, (".tflite",), normalized=False)
    data = None
    if arguments.data is not None:
        data, _ = read_data(arguments.data, model)
    with refused(Exception), noted() as more:
        content, report = integer_file(
            model,
            data,
            equalize=arguments.equalize,
            correct_bias=arguments.correct_bias,
        )
    right = report.error <= arguments.tolerance
    if right:
        output.write(
            arguments, arguments.output, lambda path: path.write_bytes(content)
        )
    compared = (
        f"largest error of an output {report.error:.2%} on {report.samples} samples"
    )
    end = f"{report.size:,} bytes: {arguments.output}" if right else "nothing written"
    lines = [*notes, *more, f"{compared}; {end}"]
    show(arguments, report.to_dict(), HEADER, report.rows(), lines)
    return 0 if right else 1
