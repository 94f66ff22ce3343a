"""`keras-bn convert`: replace Keras's batch normalizations by ours, or back."""

from keras_bn.cli.models import add_command, channels, open_model, save
from keras_bn.cli.output import show


def add(commands):
    """Add the command."""
    parser = add_command(
        commands,
        "convert",
        "replace Keras's batch normalizations by those of keras_bn, or back",
        "Replace every batch normalization of a model saved by Keras 3 or Keras 2 by "
        "keras_bn's. Weights, names and training state are kept.",
        _run,
        output=True,
    )
    parser.add_argument(
        "--to",
        choices=("keras_bn", "keras"),
        default="keras_bn",
        help="whose layers to use (keras_bn)",
    )


def _run(arguments):
    model, layers, _, notes = open_model(arguments)
    notes = [*notes, *save(arguments, model, native=arguments.to == "keras")]
    rows = [[path, str(channels(layer))] for path, layer in layers.items()]
    results = {"converted": list(layers), "to": arguments.to}
    closing = f"{len(rows)} converted to {arguments.to}: {arguments.output}"
    show(arguments, results, ["layer", "channels"], rows, [*notes, closing])
    return 0
