"""`keras-bn export-int8`: a file of integers, checked against float."""

import contextlib
import pathlib

from keras_bn.cli import output
from keras_bn.cli.data import read_data
from keras_bn.cli.errors import refused, warning_texts
from keras_bn.cli.models import open_model
from keras_bn.cli.output import show
from keras_bn.int8 import tflite
from keras_bn.int8.export import integer_file
from keras_bn.int8.report import HEADER


def run(arguments):
    with refused(RuntimeError):
        tflite.check_backend("export-int8")
    model, _, _, notes, _ = open_model(arguments, normalized=False)
    data, options, lose = None, {}, arguments.lose
    if arguments.data is not None:
        data = read_data(arguments, model)
        options = {"steps": arguments.steps}
        if data.in_arrays():
            options["batch_size"] = arguments.batch_size
    with refused(Exception), warning_texts() as more, _own_words():
        content, report = integer_file(
            model,
            data and (data.without_labels() if lose is None else data.whole()),
            **options,
            equalize=arguments.equalize,
            correct_bias=arguments.correct_bias,
            activations=arguments.activations,
            keep_float=arguments.keep_float,
            suffix=pathlib.Path(arguments.output).suffix,
            symmetric=arguments.symmetric,
            lose=lose,
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
    lines = [*notes, *more, *report.said(), f"{compared}; {end}"]
    if not right:
        lines.append(_advice(arguments))
    show(arguments, report.to_dict(), HEADER, report.rows(), lines)
    return 0 if right else 1


# What the messages of `keras_bn.export_int8` name, in the words of the command.
_WORDS = {
    "`data` with them, as `(x, y)`": "them in `--data DATA`, as y",
    "Give another `metric`": "Call `keras_bn.export_int8` with another `metric`",
    "`data`": "`--data DATA`",
    "`equalize`": "`--equalize`",
    "`lose`": "`--lose`",
    "`activations`": "`--activations`",
    "`keep_float`": "`--keep-float`",
    "`symmetric`": "`--symmetric`",
}


@contextlib.contextmanager
def _own_words():
    """Name options of the command in errors, in the place of arguments."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for argument, option in _WORDS.items():
            message = message.replace(argument, option)
        raise ValueError(message) from error


def _advice(arguments):
    """What to try where the file differs by too much."""
    tries = ["samples in --data that are like those of training, a few hundred"]
    if not arguments.equalize:
        tries.append("--equalize")
    if arguments.activations == 8:
        if arguments.lose is None:
            tries.append("--lose X, with labels in --data")
        if not arguments.output.lower().endswith(".onnx"):
            tries.append("--activations 16")
    return (
        f"above --tolerance {arguments.tolerance:g}. Try {'; '.join(tries)}; or train "
        "for int8: keras_bn.quantize_aware. The layers above show where the error "
        "begins."
    )
