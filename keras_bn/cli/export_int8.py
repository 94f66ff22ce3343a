"""`keras-bn export-int8`: a file of integers for TFLite, checked against float."""

from keras_bn.cli import output
from keras_bn.cli.data import read_data
from keras_bn.cli.errors import noted, refused
from keras_bn.cli.models import open_model
from keras_bn.cli.output import show
from keras_bn.int8 import tflite
from keras_bn.int8.export import integer_file
from keras_bn.int8.report import HEADER


def run(arguments):
    with refused(RuntimeError):
        tflite.check_backend("export-int8")
    model, _, _, notes = open_model(arguments, normalized=False)
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
