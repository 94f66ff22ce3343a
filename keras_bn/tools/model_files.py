"""What the commands on model files share: arguments, models, data, what they print."""

import json
import warnings
from pathlib import Path
from zipfile import BadZipFile

from keras_bn.tools.files import check_writable, write_whole


def add_command(commands, name, summary, description, output=False):
    """A parser of a command on a model file, and its usual arguments.

    Args:
        commands: what `add_subparsers` gave.
        name, summary, description: of the command.
        output: whether it writes a model.
    """
    parser = commands.add_parser(name, help=summary, description=description)
    files = "a .keras or .h5 file"
    parser.add_argument("model", metavar="IN" if output else "MODEL", help=files)
    if output:
        parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--json", metavar="FILE", help='write the results to a file; "-" for stdout'
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    return parser


def open_model(arguments):
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
        arguments.parser.error(first_line(error))
    except Exception as error:  # whatever Keras makes of a file it can't read
        arguments.parser.error(f"{arguments.model} can't be loaded: {error}"[:500])


def normalizations(model):
    """The batch normalizations of a model by path; ends the command without any."""
    from keras_bn.tools.convert import is_ours
    from keras_bn.tools.graph import walk

    layers = {path: layer for path, layer in walk(model) if is_ours(layer)}
    if not layers:
        raise SystemExit(f"'{model.name}' has no batch normalization in it.")
    return layers


def read_data(arguments, model):
    """The arrays of the data file, as the model takes them, and the labels `y`.

    Returns:
        The inputs, an array or a dict of arrays, and the labels or None.
    """
    try:
        arrays = _arrays(arguments.data)
        inputs = _inputs(arguments.data, arrays, model)
        labels = arrays.get("y")
        if any(labels is x for x in inputs.values()):
            labels = None
        _check(arguments.data, {**inputs, **({} if labels is None else {"y": labels})})
    except ValueError as error:
        arguments.parser.error(str(error))
    return inputs if len(inputs) > 1 else next(iter(inputs.values())), labels


def _arrays(file):
    import numpy as np

    try:
        opened = np.load(file, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError(
                "it is one array (.npy); write it with np.savez(file, x=x)"
            )
        with opened:
            return {name: opened[name] for name in opened.files}
    except (OSError, ValueError, BadZipFile, EOFError) as error:
        raise ValueError(f"{file} can't be read: {first_line(error)}") from error


def _inputs(file, arrays, model):
    """The arrays for the inputs of the model, by name; refuses those that don't fit."""
    tensors = getattr(model, "inputs", None) or []
    if len(tensors) < 2:
        names = ["x", *(tensor.name for tensor in tensors)]
        chosen = [name for name in names if name in arrays][:1] or list(arrays)
        if len(chosen) != 1:
            raise ValueError(
                f"{file} must hold one array, or one called {' or '.join(names)}, not "
                f"{', '.join(arrays) or 'none'}"
            )
        taken = {chosen[0]: tensors[0] if tensors else None}
    else:
        taken = {tensor.name: tensor for tensor in tensors}
        if missing := [name for name in taken if name not in arrays]:
            raise ValueError(
                f"{file} lacks an array for the input {', '.join(missing)}; it holds "
                f"{', '.join(arrays) or 'none'}"
            )
    for name, tensor in taken.items():
        if tensor is not None and not _fits(arrays[name].shape, tensor.shape):
            raise ValueError(
                f"{name} in {file} has the shape {arrays[name].shape}, and the model "
                f"takes {tuple(tensor.shape)}"
            )
    return {name: arrays[name] for name in taken}


def _fits(shape, expected):
    # Keras adds a last axis of size 1 to (batch,) by itself.
    if len(shape) == 1 and tuple(expected[1:]) == (1,):
        return True
    return len(shape) == len(expected) and all(
        want in (None, size) for size, want in zip(shape, expected, strict=True)
    )


def _check(file, arrays):
    """Refuse what is not numbers, and arrays that are not of the same samples."""
    import numpy as np

    for name, array in arrays.items():
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
            raise ValueError(f"{name} in {file} holds no numbers but {array.dtype}")
        if array.ndim == 0 or not len(array):
            raise ValueError(f"{name} in {file} holds no samples")
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise ValueError(f"{file} holds unequal numbers of samples: {said}")


def save(arguments, model, native=False):
    """Write a model to the command's output, whole or not at all.

    Args:
        arguments: of the command.
        model: the model.
        native: whether with Keras's own layers, as its file had them.
    """
    from keras_bn.tools.convert import to_keras

    if native:
        model = to_keras(model)

    def write(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save(path)

    try:
        write_whole(arguments.output, write, arguments.force)
    except OSError as error:
        arguments.parser.error(f"{arguments.output} can't be written: {error}")


def show(arguments, records, header, rows, closing):
    """Print the table and what there is to say; write the JSON."""
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


def statistics(layer):
    """Moving mean and variance of a layer, in float64."""
    import numpy as np

    return (
        np.asarray(layer.moving_mean.numpy(), "float64"),
        np.asarray(layer.moving_variance.numpy(), "float64"),
    )


def channels(layer):
    """How many channels a layer has; a list of sizes for several axes."""
    sizes = tuple(layer.moving_mean.shape)
    return sizes[0] if len(sizes) == 1 else list(sizes)


def first_line(error):
    """What an error says first."""
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
