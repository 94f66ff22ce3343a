"""`keras-bn convert`: Keras's batch normalizations exchanged for ours, or back."""

from keras_bn.commands.models import add_command, channels, open_model, save
from keras_bn.commands.output import show


def add(commands):
    """Add the command."""
    parser = add_command(
        commands,
        "convert",
        "exchange Keras's batch normalizations for those of keras_bn, or back",
        "Exchange every batch normalization of a saved Keras model, of Keras 3 or "
        "Keras 2, for keras_bn's. Weights, names and training state are kept.",
        _run,
        output=True,
    )
    parser.add_argument(
        "--to",
        choices=("keras_bn", "keras"),
        default="keras_bn",
        help="whose layers to put in (keras_bn)",
    )


def _run(arguments):
    model, layers, _, notes = open_model(arguments)
    save(arguments, model, native=arguments.to == "keras")
    rows = [[path, str(channels(layer))] for path, layer in layers.items()]
    results = {"converted": list(layers), "to": arguments.to}
    closing = f"{len(rows)} converted to {arguments.to}: {arguments.output}"
    show(arguments, results, ["layer", "channels"], rows, [*notes, closing])
    return 0
