"""`keras-bn inspect`: list the batch normalizations of a file, and diagnose them."""

import shlex

from keras_bn.cli import output
from keras_bn.cli.diagnosing import as_in_file, diagnosed, run_on
from keras_bn.cli.errors import UsageError, noted
from keras_bn.cli.models import channels, open_model, save
from keras_bn.tools.fold import Fold, plan_fold

_HEADER = ["layer", "channels", "axis", "momentum", "epsilon", "state", "folds into"]


def run(arguments):
    _check_plot(arguments)
    opened = open_model(arguments)
    model = as_in_file(opened)
    report = diagnosed(arguments, model, arguments.model)
    records = _listed(opened, report)
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
    results = {"layers": records, "diagnosis": report.to_dict()}
    count = f"{len(rows)} {records[0]['class']} in {opened.model.name}"
    lines = [*opened.notes, count, "", str(report)]
    shown = last = report
    if arguments.fix is not None:
        with run_on(arguments.data), noted() as notes:
            shown = report.fix()
        last = shown.after
        save(arguments, model, file=arguments.fix)
        results["fix"] = {"file": arguments.fix, **shown.to_dict()}
        lines += ["", *notes, str(shown), "", f"Written: {arguments.fix}"]
    elif remedy := _on_files(arguments, report):
        lines += ["", f"On files: {remedy}"]
    lines += _write(arguments, report, shown)
    output.show(arguments, results, _HEADER, rows, lines)
    return 0 if arguments.data is None or last.healthy else 1


def _check_plot(arguments):
    if arguments.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError("--plot needs matplotlib; --html does without") from error


def _write(arguments, report, shown):
    """Write the figure of a report and the page of what is shown; a line on each."""
    outputs = {
        arguments.plot: report.plot,
        arguments.html: lambda path: path.write_text(shown.to_html(), encoding="utf-8"),
    }
    written = [file for file in outputs if file is not None]
    for file in written:
        output.write(arguments, file, outputs[file])
    return [f"Written: {file}" for file in written]


def _on_files(arguments, report):
    """The command that recalibrates the file, if that fixes something."""
    mended = {each.layer for each in report.findings if each.tool == "recalibrate"}
    if not mended or arguments.data is None:
        return None
    layers = report.record.layers
    frozen = any(each.frozen for each in layers if each.layer in mended)
    words = ["keras-bn", "recalibrate", arguments.model, "OUT.keras"]
    words += ["--data", arguments.data]
    words += ["--include-frozen"] * frozen
    for module in arguments.modules:
        words += ["--import", module]
    return shlex.join(words)


def _listed(opened, report):
    plan = {fold.layer: fold for fold in plan_fold(opened.model)}
    library = "keras.layers" if opened.native else "keras_bn"
    records = []
    for path, layer in opened.layers.items():
        fold = plan.get(path) or Fold(path, None, "folding does not know its class")
        records.append(
            {
                "layer": path,
                "class": f"{library}.BatchNormalization",
                "channels": channels(layer),
                "axis": layer.axis,
                "momentum": layer.momentum,
                "epsilon": layer.epsilon,
                "state": ", ".join(_state(path, report)),
                "fold_into": fold.into,
                "stays": fold.reason,
            }
        )
    return records


def _state(path, report):
    """The kinds of findings in a layer, in words."""
    if path in report.record.not_called:
        return ["not called"]
    kinds = [each.kind for each in report.findings if each.layer == path]
    # Only data shows that a layer is healthy.
    nothing = "healthy" if report.record.has_data else "updated"
    return [kind.replace("-", " ") for kind in kinds] or [nothing]
