"""The digits that the equivalence examples train on, as the command line names them."""

from studies.common import data  # isort: skip (before Keras: it sets TensorFlow's logging)

import argparse
import itertools
import pathlib
import socket
import zipfile

import keras
import numpy as np


class DataError(Exception):
    """The data can't be had; the message says what to do."""


def enlarged_digits():
    """scikit-learn's digits, enlarged from 8x8 to 28x28: float64 rows of 784."""
    small = data.small_digits()
    x_train, x_val = (_enlarged(images) for images in (small.x_train, small.x_val))
    return data.Data(x_train, small.y_train, x_val, small.y_val)


def _enlarged(images):
    images = np.kron(images[..., 0].astype("float64"), np.ones((1, 3, 3)))
    return np.pad(images, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784)


def mnist(path=None):
    """The real MNIST, from a local mnist.npz or as Keras downloads it."""
    if path is not None:
        arrays = _mnist_file(path)
    else:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            arrays = itertools.chain(*keras.datasets.mnist.load_data())
        except Exception as error:  # Keras raises nothing narrower.
            raise DataError(
                f"MNIST could not be downloaded ({error}). Go online and try again, or "
                "pass a copy you have with --mnist-file PATH, or leave --data mnist "
                "out: the digits that come with scikit-learn need no network."
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    x_train, y_train, x_val, y_val = arrays
    x_train, x_val = (x.reshape(-1, 784) / 255 for x in (x_train, x_val))
    return data.Data(x_train, y_train.astype(int), x_val, y_val.astype(int))


# What np.load and looking into its result raise for files that are something else.
# An array is no context manager: an AttributeError on Python 3.10, else a TypeError.
UNREADABLE = (
    *(OSError, EOFError, LookupError, AttributeError, TypeError, ValueError),
    zipfile.BadZipFile,
)


def _mnist_file(path):
    try:
        with np.load(path) as file:
            arrays = [file[n] for n in ("x_train", "y_train", "x_test", "y_test")]
        for x, y in (arrays[:2], arrays[2:]):
            if x.dtype != np.uint8 or x.shape[1:] != (28, 28) or not len(x):
                raise ValueError(f"images are {x.dtype} of shape {x.shape}")
            if y.shape != x.shape[:1] or not np.isin(y, range(10)).all():
                raise ValueError("the classes are not one digit for each image")
    except UNREADABLE as error:
        raise DataError(
            f"{path} can't be read as MNIST ({error}). --mnist-file needs the "
            "mnist.npz that Keras downloads: x_train and x_test, bytes of shape "
            "(images, 28, 28), with their digits in y_train and y_test."
        ) from error
    return arrays


def parse(description, out, argv=None, more=None):
    """The arguments, and the data they name; exits with a message if it can't be had.

    Args:
        description: of the example, for --help.
        out: default of --out.
        argv: list of arguments; None for those of the command line.
        more: function that is given `add_argument`, for the example's own arguments.

    Returns:
        `(arguments, data)`: a namespace with `data`, `mnist_file`, `epochs`,
        `batch_size`, `seed` and `out`, and a `data.Data`. The folder `out` exists.
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
    for name, minimum, default, text in (
        ("--epochs", 1, 5, "how often to go through the training images"),
        (
            "--batch-size",
            2,
            32,
            "images in a batch; what does not fill one is left out",
        ),
        ("--seed", 0, 0, "of the initial weights and the order of the images"),
    ):
        add(name, type=_at_least(minimum), default=default, metavar="N", help=text)
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(out),
        metavar="DIR",
        help="folder for the results",
    )
    if more:
        more(add)
    given = parser.parse_args(argv)
    if given.mnist_file and given.data != "mnist":
        parser.error("--mnist-file goes with --data mnist")
    try:
        real = given.data == "mnist"
        images = mnist(given.mnist_file) if real else enlarged_digits()
    except DataError as error:
        parser.exit(2, f"{error}\n")
    if given.batch_size > len(images.x_train):
        parser.error(f"--batch-size: there are only {len(images.x_train)} images")
    given.out.mkdir(parents=True, exist_ok=True)
    return given, images


def _at_least(minimum):
    def number(text):
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return number
