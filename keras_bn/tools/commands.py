"""The commands that work on model files: inspect, convert, fold, recalibrate.

Each `add_…` adds a command's arguments to the command line, and says what to run.
"""

import json
import warnings
from pathlib import Path

from keras_bn.tools.files import check_writable, write_whole

# How far the outputs of a folded model may be from the original's, relative to their
# spread: beyond, something is wrong, and nothing is written.
_TOLERANCE = 1e-4


def add_inspect(commands):
    parser = _parser(
        commands,
        "inspect",
        "list the batch normalizations of a saved model",
        "List the batch normalizations of a saved Keras model: their options, the "
        "state of their statistics, and where `keras-bn fold` would put them.",
    )
    parser.set_defaults(run=_inspect, parser=parser)


def add_convert(commands):
    parser = _parser(
        commands,
        "convert",
        "exchange Keras's batch normalizations for those of keras_bn, or back",
        "Exchange every batch normalization of a saved Keras model, of Keras 3 or "
        "Keras 2, for keras_bn's. Weights, names and training state are kept.",
        output=True,
    )
    parser.add_argument(
        "--to",
        choices=("keras_bn", "keras"),
        default="keras_bn",
        help="whose layers to put in (keras_bn)",
    )
    parser.set_defaults(run=_convert, parser=parser)


def add_fold(commands):
    parser = _parser(
        commands,
        "fold",
        "fold batch normalizations into the layers next to them, for inference",
        "Write a model for inference in which the batch normalizations are folded into "
        "the weights of the layers next to them. Both models are compared on random "
        f"input; if they differ by more than {_TOLERANCE:g} of the spread of the "
        "outputs, nothing is written and the exit status is 1.",
        output=True,
    )
    parser.set_defaults(run=_fold, parser=parser)


def add_recalibrate(commands):
    parser = _parser(
        commands,
        "recalibrate",
        "replace the moving statistics by those of your data",
        "Run data through a model and replace the moving statistics of its batch "
        "normalizations by those of the data, pooled over all batches.",
        output=True,
    )
    parser.add_argument(
        "--data",
        metavar="FILE.npz",
        required=True,
        help="the inputs: one array, or arrays named as the inputs of the model",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="layer by layer, as if the data were one batch; one pass for each layer",
    )
    parser.add_argument(
        "--prior",
        metavar="N",
        type=float,
        default=0,
        help="how many samples the present statistics count for (0)",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=32, help="samples at once (32)"
    )
    parser.add_argument(
        "--include-frozen", action="store_true", help="change frozen layers, too"
    )
    parser.set_defaults(run=_recalibrate, parser=parser)


ADD = (add_inspect, add_convert, add_fold, add_recalibrate)


def _parser(commands, name, summary, description, output=False):
    parser = commands.add_parser(name, help=summary, description=description)
    parser.add_argument("model", metavar="IN" if output else "MODEL", help=_FILES)
    if output:
        parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--json", metavar="FILE", help='write the results to a file; "-" for stdout'
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    return parser


_FILES = "a .keras or .h5 file"


def _inspect(arguments):
    from keras_bn.tools.fold import plan_fold

    model, _ = _open(arguments)
    layers = _layers(model)
    plan = {fold.layer: fold for fold in plan_fold(model)}
    records = [
        {
            "layer": path,
            "channels": _channels(layer),
            "axis": layer.axis,
            "momentum": layer.momentum,
            "epsilon": layer.epsilon,
            "state": _state(layer),
            "fold_into": plan[path].into,
            "stays": plan[path].reason,
        }
        for path, layer in layers.items()
    ]
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
    header = ["layer", "channels", "axis", "momentum", "epsilon", "state", "folds_into"]
    return _report(arguments, records, header, rows, f"{len(rows)} in {model.name}")


def _convert(arguments):
    from keras_bn.tools.convert import to_keras

    model, _ = _open(arguments)
    layers = _layers(model)
    if arguments.to == "keras":
        try:
            model = to_keras(model)
        except ValueError as error:
            arguments.parser.error(str(error))
    _save(arguments, model)
    rows = [[path, str(_channels(layer))] for path, layer in layers.items()]
    records = {"converted": list(layers), "to": arguments.to}
    closing = f"{len(rows)} converted to {arguments.to}: {arguments.output}"
    return _report(arguments, records, ["layer", "channels"], rows, closing)


def _fold(arguments):
    from keras_bn.tools.compare import random_inputs, relative_difference
    from keras_bn.tools.fold import fold, plan_fold

    model, native = _open(arguments)
    _layers(model)
    plan = plan_fold(model)
    folded = fold(model)
    try:
        x = random_inputs(model)
    except ValueError as error:
        difference, measured = None, f"not compared: {error}"
    else:
        difference = float(
            relative_difference(model(x, training=False), folded(x, training=False))
        )
        measured = f"largest difference of the outputs {difference:.1e} of their spread"
    records = {
        "folded": {each.layer: each.into for each in plan if each.into is not None},
        "stays": {each.layer: each.reason for each in plan if each.into is None},
        "relative_difference": difference,
    }
    rows = [[each.layer, each.into or "stays", each.reason] for each in plan]
    header = ["layer", "into", "why"]
    if difference is not None and not difference <= _TOLERANCE:
        _report(arguments, records, header, rows, f"{measured}: nothing written")
        return 1
    _save(arguments, _native(folded) if native else folded)
    gone = sum(each.into is not None for each in plan)
    closing = f"{gone} of {len(plan)} folded, {measured}: {arguments.output}"
    return _report(arguments, records, header, rows, closing)


def _recalibrate(arguments):
    import numpy as np

    from keras_bn.tools.recalibrate import recalibrate

    model, native = _open(arguments)
    layers = _layers(model)
    data = _data(arguments, model)
    before = {path: _statistics(layer) for path, layer in layers.items()}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = recalibrate(
                model,
                data,
                exact=arguments.exact,
                prior=arguments.prior,
                batch_size=arguments.batch_size,
                include_frozen=arguments.include_frozen,
                verbose=0 if arguments.json == "-" else "auto",
            )
    except ValueError as error:
        arguments.parser.error(_first_line(error))
    records = []
    for path, moments in found.items():
        mean, variance = _statistics(layers[path])
        stddev = np.sqrt(variance + layers[path].epsilon)
        old_mean, old_variance = before[path]
        records.append(
            {
                "layer": path,
                "elements": int(moments.count.min()),
                "mean_moved": float((np.abs(mean - old_mean) / stddev).max()),
                "stddev_ratio": float(
                    np.median(stddev / np.sqrt(old_variance + layers[path].epsilon))
                ),
            }
        )
    _save(arguments, _native(model) if native else model)
    rows = [
        [
            r["layer"],
            f"{r['elements']:,}",
            f"{r['mean_moved']:.3g}",
            f"{r['stddev_ratio']:.3g}",
        ]
        for r in records
    ]
    notes = [
        str(w.message)
        for w in caught
        if issubclass(w.category, UserWarning) and "keras_bn" in str(w.filename)
    ]
    closing = "\n".join(
        [*notes, f"{len(rows)} of {len(layers)} recalibrated: {arguments.output}"]
    )
    header = ["layer", "elements", "largest |Δmean|/std", "median std ratio"]
    results = {"layers": records, "warnings": notes}
    return _report(arguments, results, header, rows, closing)


def _open(arguments):
    """The model, and whether its file has Keras's own layers in it."""
    from keras_bn.tools.load import holds_ours, load_model

    output = getattr(arguments, "output", None)
    try:
        if output is not None:
            if Path(output).suffix not in (".keras", ".h5"):
                raise ValueError(f"{output} must end in .keras or .h5")
            check_writable(output, arguments.force)
        if arguments.json not in (None, "-"):
            check_writable(arguments.json, arguments.force)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_model(arguments.model), not holds_ours(arguments.model)
    except (OSError, ValueError) as error:
        arguments.parser.error(_first_line(error))
    except Exception as error:  # whatever Keras makes of a file it can't read
        arguments.parser.error(f"{arguments.model} can't be loaded: {error}"[:500])


def _layers(model):
    """The batch normalizations of a model by path; ends the command without any."""
    from keras_bn.tools.convert import is_ours
    from keras_bn.tools.graph import walk

    layers = {path: layer for path, layer in walk(model) if is_ours(layer)}
    if not layers:
        raise SystemExit(f"'{model.name}' has no batch normalization in it.")
    return layers


def _data(arguments, model):
    """The arrays of the data file, as the model takes them."""
    import numpy as np

    try:
        with np.load(arguments.data, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        arguments.parser.error(f"{arguments.data} can't be read: {_first_line(error)}")
    inputs = getattr(model, "inputs", None) or [None]
    if len(inputs) == 1:
        if len(arrays) != 1 and "x" not in arrays:
            arguments.parser.error(
                f"{arguments.data} must hold one array, or one called x, not "
                f"{', '.join(arrays) or 'none'}"
            )
        return arrays["x"] if "x" in arrays else next(iter(arrays.values()))
    names = [tensor.name for tensor in inputs]
    missing = [name for name in names if name not in arrays]
    if missing:
        arguments.parser.error(
            f"{arguments.data} lacks an array for the input {', '.join(missing)}"
        )
    return {name: arrays[name] for name in names}


def _native(model):
    """The model with Keras's own layers, as its file had them."""
    from keras_bn.tools.convert import to_keras

    return to_keras(model)


def _save(arguments, model):
    def save(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save(path)

    try:
        write_whole(arguments.output, save, arguments.force)
    except OSError as error:
        arguments.parser.error(f"{arguments.output} can't be written: {error}")


def _report(arguments, records, header, rows, closing):
    """Print the table and what there is to say; write the JSON. Returns status 0."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=arguments.json == "-", highlight=False)
    table = Table(*header, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(closing, soft_wrap=True, markup=False)
    if arguments.json is not None:
        text = json.dumps(records, indent=1) + "\n"
        if arguments.json == "-":
            print(text, end="")
        else:
            write_whole(
                arguments.json, lambda path: path.write_text(text), arguments.force
            )
    return 0


def _statistics(layer):
    import numpy as np

    return (
        np.asarray(layer.moving_mean.numpy(), "float64"),
        np.asarray(layer.moving_variance.numpy(), "float64"),
    )


def _channels(layer):
    sizes = tuple(layer.moving_mean.shape)
    return sizes[0] if len(sizes) == 1 else list(sizes)


def _state(layer):
    """In a word: how the statistics of a layer are."""
    mean, variance = _statistics(layer)
    if not (mean == mean).all() or not (abs(mean) < float("inf")).all():
        return "not finite"
    if (mean == 0).all() and (variance == 1).all():
        return "never updated"
    return "frozen" if not layer.trainable or layer.freeze_statistics else "ok"


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
