"""`keras-bn inspect`: list the batch normalizations of a file, and diagnose them."""

from keras_bn.cli import output
from keras_bn.cli.diagnosing import as_in_file, commands, diagnosed
from keras_bn.cli.errors import UsageError, refused, warning_texts
from keras_bn.cli.models import channels, open_model, save
from keras_bn.diagnosis import text
from keras_bn.diagnosis.collect import momentum_of
from keras_bn.pages.plain import escaped
from keras_bn.tools.fold import Fold, plan_fold

_HEADER = [
    "layer",
    "class",
    "channels",
    "axis",
    "momentum",
    "epsilon",
    "state",
    "folds into",
]


def run(arguments):
    _check_plot(arguments)
    opened = open_model(arguments)
    model = as_in_file(opened)
    report = diagnosed(arguments, model, arguments.model)
    records = _listed(opened, report)
    rows = [
        [
            record["layer"],
            record["class"],
            str(record["channels"]),
            str(record["axis"]),
            "mean" if record["momentum"] is None else f"{record['momentum']:g}",
            f"{record['epsilon']:g}",
            record["state"],
            record["fold_into"] or "stays",
        ]
        for record in records
    ]
    results = {"layers": records, "diagnosis": report.to_dict()}
    command = commands(arguments, arguments.model)
    header, (kind, *others) = _HEADER, dict.fromkeys(row[1] for row in rows)
    if not others:  # the line below the table says it
        header, rows = [*header[:1], *header[2:]], [[r[0], *r[2:]] for r in rows]
    kind = "batch normalizations" if others else kind
    count = f"{len(rows)} {kind} in {escaped(model.name)}"
    lines = [*opened.notes, count, "", *text.lines_of(report, command)]
    shown = last = report
    if arguments.fix is not None:
        what = f"the model can't be run on {arguments.data}: "
        with refused(Exception, saying=what), warning_texts() as notes:
            shown = report.fix()
        last = shown.after
        save(arguments, model, file=arguments.fix)
        results["fix"] = {"file": arguments.fix, **shown.to_dict()}
        lines += ["", *notes, *str(shown).splitlines()]
        lines += ["", f"Written: {arguments.fix}"]
    output.show(arguments, results, header, rows, lines, words=["state"])
    if arguments.quiet and arguments.json != "-":
        print(*text.findings(report.findings, command), sep="\n")
    _write(arguments, report, shown)
    failed = arguments.data is not None and not last.healthy
    return int(failed and not arguments.exit_zero)


def _check_plot(arguments):
    if arguments.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError("--plot needs matplotlib; --html does without") from error


def _write(arguments, report, shown):
    """Write the figure of a report and the page of what is shown."""
    outputs = {
        arguments.plot: report.plot,
        arguments.html: lambda path: path.write_text(shown.to_html(), encoding="utf-8"),
    }
    for file, write in outputs.items():
        if file is not None:
            output.write(arguments, file, write)
            output.console(arguments).out(f"Written: {file}")


def _listed(opened, report):
    plan = {fold.layer: fold for fold in plan_fold(opened.model)}
    records = []
    for path, layer in opened.layers.items():
        fold = plan.get(path) or Fold(path, None, "folding does not know its class")
        of_keras = opened.native or layer.name in opened.of_keras
        library = "keras.layers" if of_keras else "keras_bn"
        records.append(
            {
                "layer": path,
                "class": f"{library}.BatchNormalization",
                "channels": channels(layer),
                "axis": layer.axis,
                "momentum": momentum_of(layer),
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
    kinds = [f.kind for f in report.findings if f.layer == path]
    # Only data shows that a layer is healthy.
    nothing = "healthy" if report.record.has_data else "updated"
    return [kind.replace("-", " ") for kind in kinds] or [nothing]
