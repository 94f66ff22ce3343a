"""`keras-bn convert`: replace Keras's batch normalizations by ours, or back."""

from keras_bn.cli.models import channels, open_model, save
from keras_bn.cli.output import show


def run(arguments):
    model, layers, _, notes = open_model(arguments)
    notes = [*notes, *save(arguments, model, native=arguments.to == "keras")]
    rows = [[path, str(channels(layer))] for path, layer in layers.items()]
    results = {"converted": list(layers), "to": arguments.to}
    closing = f"{len(rows)} converted to {arguments.to}: {arguments.output}"
    show(arguments, results, ["layer", "channels"], rows, [*notes, closing])
    return 0
