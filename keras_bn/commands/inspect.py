"""`keras-bn inspect`: list the batch normalizations of a file, and diagnose them."""

import shlex
from pathlib import Path

import numpy as np
from keras import tree

from keras_bn.commands import output
from keras_bn.commands.data import read_data
from keras_bn.commands.errors import UsageError, noted, refused
from keras_bn.commands.models import add_command, channels, open_model
from keras_bn.commands.options import at_least
from keras_bn.diagnosis.report import diagnose
from keras_bn.tools.arrays import is_initial, moving
from keras_bn.tools.convert import to_keras
from keras_bn.tools.fold import Fold, plan_fold
from keras_bn.tools.norms import is_frozen, normalizations

_HEADER = ["layer", "channels", "axis", "momentum", "epsilon", "state", "folds into"]


def add(commands):
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        "list the batch normalizations of a saved model; with data, diagnose them",
        "List the batch normalizations of a saved Keras model: their options, the "
        "state of their statistics, and where `keras-bn fold` would put them. With "
        "--data, say what is wrong with them and what fixes it; the exit status is "
        "then 1 if there are errors or warnings.",
        _run,
    )
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
    parser.add_argument("--plot", metavar="OUT.png", help="draw the diagnosis")
    parser.add_argument(
        "--html", metavar="OUT.html", help="write the diagnosis as a page"
    )


def _run(arguments):
    _check_arguments(arguments)
    model, layers, native, notes = open_model(arguments)
    if native and arguments.data is not None:
        # Use the layers of the file, so that the remedies fit them.
        with refused(TypeError, ValueError):
            model = to_keras(model)
        layers = normalizations(model)
    report = None if arguments.data is None else _diagnosed(arguments, model)
    records = _listed(model, layers, report)
    rows = [
        [
            each["layer"],
            str(each["channels"]),
            str(each["axis"]),
            "mean" if each["momentum"] is None else f"{each['momentum']:g}",
            f"{each['epsilon']:g}",
            each["state"],
            each["fold_into"] or "stays",
        ]
        for each in records
    ]
    results = {"layers": records}
    lines = [*notes, f"{len(rows)} in {model.name}"]
    if report is not None:
        results["diagnosis"] = report.to_dict()
        lines += ["", str(report), *_write(arguments, report)]
        if remedy := _on_files(arguments, report):
            lines += ["", f"On files: {remedy}"]
    output.show(arguments, results, _HEADER, rows, lines)
    return 0 if report is None or report.healthy else 1


def _check_arguments(arguments):
    """Refuse impossible requests before any work."""
    wanted = (("--plot", (".png", ".svg", ".pdf")), ("--html", (".html", ".htm")))
    for option, suffixes in wanted:
        file = getattr(arguments, option[2:])
        if file is None:
            continue
        if arguments.data is None:
            raise UsageError(f"{option} shows a diagnosis, which needs --data")
        if Path(file).suffix not in suffixes:
            raise UsageError(f"{option} {file} must end in {' or '.join(suffixes)}")
        output.check(arguments, file)
    if arguments.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError("--plot needs matplotlib; --html does without") from error


def _diagnosed(arguments, model):
    inputs, labels = read_data(arguments.data, model)
    order = np.random.default_rng(0).permutation(len(tree.flatten(inputs)[0]))
    data = tree.map_structure(lambda array: array[order], inputs)
    if labels is not None:
        data = (data, labels[order])
    what = f"the model can't be run on {arguments.data}: "
    with refused(Exception, saying=what), noted():
        return diagnose(model, data, batch_size=arguments.batch_size)


def _write(arguments, report):
    """Write the requested figure and page; gives a line on each."""
    outputs = {
        arguments.plot: report.plot,
        arguments.html: lambda path: path.write_text(
            report.to_html(), encoding="utf-8"
        ),
    }
    written = [file for file in outputs if file is not None]
    for file in written:
        output.write(arguments, file, outputs[file])
    return [f"Written: {file}" for file in written]


def _on_files(arguments, report):
    """The command that recalibrates the file, if that fixes something."""
    mended = {each.layer for each in report.findings if each.tool == "recalibrate"}
    if not mended:
        return None
    layers = report.record.layers
    frozen = any(each.frozen for each in layers if each.layer in mended)
    words = ["keras-bn", "recalibrate", arguments.model, "OUT.keras"]
    words += ["--data", arguments.data]
    words += ["--include-frozen"] * frozen
    for module in arguments.modules:
        words += ["--import", module]
    return shlex.join(words)


def _listed(model, layers, report):
    plan = {fold.layer: fold for fold in plan_fold(model)}
    records = []
    for path, layer in layers.items():
        state = _known(layer) if report is None else _found(path, report)
        fold = plan.get(path) or Fold(path, None, "folding does not know its class")
        records.append(
            {
                "layer": path,
                "channels": channels(layer),
                "axis": layer.axis,
                "momentum": layer.momentum,
                "epsilon": layer.epsilon,
                "state": ", ".join(state),
                "fold_into": fold.into,
                "stays": fold.reason,
            }
        )
    return records


def _found(path, report):
    """The kinds of findings in a layer, from the diagnosis."""
    if path not in [each.layer for each in report.record.layers]:
        return ["not called"]
    kinds = [each.kind for each in report.findings if each.layer == path]
    return [kind.replace("-", " ") for kind in kinds] or ["healthy"]


def _known(layer):
    """The state of a layer as far as it is known without data, in the same words."""
    mean, variance = moving(layer)
    if not np.isfinite([mean, variance]).all():
        state = "non finite statistics"
    elif (variance < 0).any():
        state = "negative variance"
    elif is_initial(layer):
        state = "never updated"
    else:
        state = "updated"
    return [state, "frozen"] if is_frozen(layer) else [state]
