"""The command line of an equivalence example, up to the data it asks for."""

import argparse
import pathlib

from common.data import DataError, load


def parse(description, out, argv=None, more=None):
    """The arguments, and the data they name; exits with a message if it can't be had.

    Args:
        description: of the example, for --help.
        out: default of --out.
        argv: list of arguments; None for those of the command line.
        more: function that is given `add_argument`, for the example's own arguments.

    Returns:
        `(arguments, data)`: a namespace with `data`, `mnist_file`, `epochs`,
        `batch_size`, `seed` and `out`, and a `Data`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        choices=["digits", "mnist"],
        default="digits",
        help="digits: scikit-learn's, enlarged to 28x28, which need no network; "
        "mnist: the real one, which Keras downloads",
    )
    add(
        "--mnist-file",
        type=pathlib.Path,
        metavar="PATH",
        help="with --data mnist, a local mnist.npz instead of the download",
    )
    add(
        "--epochs",
        type=_at_least(1),
        default=5,
        metavar="N",
        help="how often to go through the training images",
    )
    add(
        "--batch-size",
        type=_at_least(2),
        default=32,
        metavar="N",
        help="images in a batch; what does not fill one sits the epoch out",
    )
    add(
        "--seed",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="of the initial weights and the order of the images",
    )
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(out),
        metavar="DIR",
        help="folder for the results",
    )
    if more:
        more(add)
    arguments = parser.parse_args(argv)
    if arguments.mnist_file and arguments.data != "mnist":
        parser.error("--mnist-file goes with --data mnist")
    try:
        data = load(arguments.data, arguments.mnist_file)
    except DataError as error:
        parser.exit(2, f"{error}\n")
    if arguments.batch_size > len(data.x_train):
        parser.error(f"--batch-size: there are only {len(data.x_train)} images")
    return arguments, data


def _at_least(minimum):
    def number(text):
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return number
