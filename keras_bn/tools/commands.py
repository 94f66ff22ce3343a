"""The commands that change model files: convert, fold, recalibrate.

Each `add_…` adds a command's arguments to the command line, and says what to run.
"""

import warnings

from keras_bn.tools.model_files import (
    add_command,
    channels,
    first_line,
    normalizations,
    open_model,
    read_data,
    save,
    show,
    statistics,
)

# How far the outputs of a folded model may be from the original's, relative to their
# spread: beyond, something is wrong, and nothing is written.
_TOLERANCE = 1e-4


def add_convert(commands):
    parser = add_command(
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
    parser = add_command(
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
    parser = add_command(
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


ADD = (add_convert, add_fold, add_recalibrate)


def _convert(arguments):
    from keras_bn.tools.convert import to_keras

    model, _ = open_model(arguments)
    layers = normalizations(model)
    if arguments.to == "keras":
        try:
            model = to_keras(model)
        except ValueError as error:
            arguments.parser.error(str(error))
    save(arguments, model)
    rows = [[path, str(channels(layer))] for path, layer in layers.items()]
    records = {"converted": list(layers), "to": arguments.to}
    closing = f"{len(rows)} converted to {arguments.to}: {arguments.output}"
    show(arguments, records, ["layer", "channels"], rows, closing)
    return 0


def _fold(arguments):
    from keras_bn.tools.compare import random_inputs, relative_difference
    from keras_bn.tools.fold import fold, plan_fold

    model, native = open_model(arguments)
    normalizations(model)
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
        show(arguments, records, header, rows, f"{measured}: nothing written")
        return 1
    save(arguments, folded, native)
    gone = sum(each.into is not None for each in plan)
    closing = f"{gone} of {len(plan)} folded, {measured}: {arguments.output}"
    show(arguments, records, header, rows, closing)
    return 0


def _recalibrate(arguments):
    import numpy as np

    from keras_bn.tools.recalibrate import recalibrate

    model, native = open_model(arguments)
    layers = normalizations(model)
    data, _ = read_data(arguments, model)
    before = {path: statistics(layer) for path, layer in layers.items()}
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
        arguments.parser.error(first_line(error))
    records = []
    for path, moments in found.items():
        mean, variance = statistics(layers[path])
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
    save(arguments, model, native)
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
    show(arguments, results, header, rows, closing)
    return 0
