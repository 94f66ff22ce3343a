"""Handwritten digits: scikit-learn's of 8x8, these enlarged to 28x28, or MNIST."""

import dataclasses
import socket
import zipfile

import keras
import numpy as np
from sklearn.datasets import load_digits

# What np.load and looking into its result raise for files that are something else.
UNREADABLE = (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile)


@dataclasses.dataclass
class Data:
    """Images as float64 rows of 784 in [0, 1], if not said otherwise, and classes."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray


class DataError(Exception):
    """The data can't be had; the message says what to do."""


def load(name, mnist_file=None):
    """The data of that name.

    Args:
        name: "digits" or "mnist".
        mnist_file: path of a local mnist.npz; None to let Keras download it.

    Raises:
        DataError: if it can't be had.
    """
    if name == "digits":
        return _digits()
    return _mnist() if mnist_file is None else _mnist_file(mnist_file)


def small_digits(training=1440):
    """scikit-learn's digits as they are, with a channel axis: what convolutions take.

    Returns:
        `Data`, with float32 images of shape (images, 8, 8, 1) in [0, 1].
    """
    images, classes = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    order = np.random.default_rng(0).permutation(len(images))
    train, val = np.split(order, [training])
    return Data(images[train], classes[train], images[val], classes[val])


def _digits():
    small = small_digits()
    x_train, x_val = (_enlarged(x) for x in (small.x_train, small.x_val))
    return Data(x_train, small.y_train, x_val, small.y_val)


def _enlarged(images):
    """From (images, 8, 8, 1) to rows of 28x28, in float64."""
    images = np.kron(images[..., 0].astype("float64"), np.ones((1, 3, 3)))
    return np.pad(images, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784)


def _mnist():
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        (x_train, y_train), (x_val, y_val) = keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises nothing narrower.
        raise DataError(
            f"MNIST could not be downloaded ({error}). Go online and try again, or "
            "pass a copy you have with --mnist-file PATH, or leave --data mnist out: "
            "the digits that come with scikit-learn need no network."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return _from_bytes(x_train, y_train, x_val, y_val)


def _mnist_file(path):
    try:
        with np.load(path) as arrays:
            names = ("x_train", "y_train", "x_test", "y_test")
            x_train, y_train, x_val, y_val = (arrays[name] for name in names)
        for x, y in ((x_train, y_train), (x_val, y_val)):
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
    return _from_bytes(x_train, y_train, x_val, y_val)


def _from_bytes(x_train, y_train, x_val, y_val):
    x_train, x_val = (x.reshape(-1, 784) / 255 for x in (x_train, x_val))
    return Data(x_train, y_train.astype(int), x_val, y_val.astype(int))
