"""`keras-bn convert`: replace Keras's batch normalizations by ours, or back."""

from keras_bn.cli.models import channels, open_model, save
from keras_bn.cli.output import show
from keras_bn.surgery.classes import made_by_classes
from keras_bn.surgery.view import ModelView


def run(arguments):
    model, layers, _, notes, _ = open_model(arguments)
    notes = [*notes, *save(arguments, model, native=arguments.to == "keras")]
    if arguments.to == "keras_bn":
        notes += _of_classes(model, arguments.output)
    rows = [[path, str(channels(layer))] for path, layer in layers.items()]
    results = {"converted": list(layers), "to": arguments.to}
    closing = f"{len(rows)} converted to {arguments.to}: {arguments.output}"
    show(arguments, results, ["layer", "channels"], rows, [*notes, closing])
    return 0


def _of_classes(model, file):
    """What to know of a file whose classes make their own layers; a list of texts."""
    if not (kinds := set(made_by_classes(ModelView(model)).values())):
        return []
    return [
        f"{file} names no layers of {' and '.join(sorted(kinds))}, which makes its "
        "own: `keras_bn.load_model` loads it with those of keras_bn, "
        "`keras.saving.load_model` with those that the class makes."
    ]
