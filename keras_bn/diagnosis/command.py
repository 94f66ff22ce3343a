"""`keras-bn inspect`: the batch normalizations of a model file, and what ails them."""

from pathlib import Path

from keras_bn.tools.files import check_writable, write_whole
from keras_bn.tools.model_files import (
    add_command,
    channels,
    first_line,
    normalizations,
    open_model,
    read_data,
    show,
    statistics,
)

_HEADER = ["layer", "channels", "axis", "momentum", "epsilon", "state", "folds into"]


def add_inspect(commands):
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        "list the batch normalizations of a saved model; with data, diagnose them",
        "List the batch normalizations of a saved Keras model: their options, the "
        "state of their statistics, and where `keras-bn fold` would put them. With "
        "--data, say what ails them and what mends it; the exit status is then 1 if "
        "there are errors or warnings.",
    )
    parser.add_argument(
        "--data",
        metavar="FILE.npz",
        help="the inputs: one array, or x, or arrays named as the inputs of the model; "
        "with labels as y, loss and accuracy are compared, too",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=32,
        help="as in training; the samples are shuffled (32)",
    )
    parser.add_argument("--plot", metavar="OUT.png", help="draw the diagnosis")
    parser.add_argument(
        "--html", metavar="OUT.html", help="write the diagnosis as a page"
    )
    parser.set_defaults(run=_inspect, parser=parser)


def _inspect(arguments):
    _check_arguments(arguments)
    model, native = open_model(arguments)
    layers = normalizations(model)
    report = None if arguments.data is None else _diagnosed(arguments, model, native)
    records = _listed(model, layers)
    rows = [
        [
            r["layer"],
            str(r["channels"]),
            str(r["axis"]),
            "mean" if r["momentum"] is None else f"{r['momentum']:g}",
            f"{r['epsilon']:g}",
            r["state"],
            r["fold_into"] or "stays",
        ]
        for r in records
    ]
    closing = [f"{len(rows)} in {model.name}"]
    results = {"layers": records}
    if report is not None:
        results["diagnosis"] = report.to_dict()
        closing += ["", str(report), *_written(arguments, report)]
        if "recalibrate" in "".join(finding.remedy for finding in report.findings):
            command = f"keras-bn recalibrate {arguments.model} OUT.keras --data"
            closing += ["", f"On files: {command} {arguments.data}"]
    show(arguments, results, _HEADER, rows, "\n".join(closing))
    return 0 if report is None or report.healthy else 1


def _check_arguments(arguments):
    """Refuse what can't be done before any work is."""
    refuse = arguments.parser.error
    wanted = (("--plot", (".png", ".svg", ".pdf")), ("--html", (".html", ".htm")))
    for option, suffixes in wanted:
        file = getattr(arguments, option[2:])
        if file is None:
            continue
        if arguments.data is None:
            refuse(f"{option} shows a diagnosis, which needs --data")
        if Path(file).suffix not in suffixes:
            refuse(f"{option} {file} must end in {' or '.join(suffixes)}")
        try:
            check_writable(file, arguments.force)
        except OSError as error:
            refuse(str(error))
    if arguments.batch_size < 1:
        refuse(f"--batch-size must be 1 or greater, not {arguments.batch_size}")
    if arguments.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError:
            refuse("--plot needs matplotlib; --html does without")


def _diagnosed(arguments, model, native):
    import numpy as np
    from keras import tree

    from keras_bn.diagnosis.report import diagnose
    from keras_bn.tools.convert import to_keras

    inputs, labels = read_data(arguments, model)
    order = np.random.default_rng(0).permutation(len(tree.flatten(inputs)[0]))
    data = tree.map_structure(lambda array: array[order], inputs)
    if labels is not None:
        data = (data, labels[order])
    try:
        # As the file has them, so that the remedies speak of the user's layers.
        return diagnose(
            to_keras(model) if native else model,
            data,
            batch_size=arguments.batch_size,
        )
    except Exception as error:  # whatever Keras makes of data that doesn't suit
        arguments.parser.error(
            f"the model can't be run on {arguments.data}: {first_line(error)}"
        )


def _written(arguments, report):
    """Write the figure and the page; yields a line on each."""
    outputs = (
        (arguments.plot, report.plot),
        (
            arguments.html,
            lambda path: path.write_text(report.to_html(), encoding="utf-8"),
        ),
    )
    for file, write in outputs:
        if file is not None:
            try:
                write_whole(file, write, arguments.force)
            except OSError as error:
                arguments.parser.error(f"{file} can't be written: {error}")
            yield f"Written: {file}"


def _listed(model, layers):
    from keras_bn.tools.fold import plan_fold

    plan = {fold.layer: fold for fold in plan_fold(model)}
    return [
        {
            "layer": path,
            "channels": channels(layer),
            "axis": layer.axis,
            "momentum": layer.momentum,
            "epsilon": layer.epsilon,
            "state": _state(layer),
            "fold_into": plan[path].into,
            "stays": plan[path].reason,
        }
        for path, layer in layers.items()
    ]


def _state(layer):
    """In a word: how the statistics of a layer are."""
    mean, variance = statistics(layer)
    if not (mean == mean).all() or not (abs(mean) < float("inf")).all():
        return "not finite"
    if (mean == 0).all() and (variance == 1).all():
        return "never updated"
    return "frozen" if not layer.trainable or layer.freeze_statistics else "ok"
