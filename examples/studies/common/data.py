"""scikit-learn's handwritten digits, with a channel axis: what convolutions take."""

import dataclasses

import numpy as np
from sklearn.datasets import load_digits


@dataclasses.dataclass
class Data:
    """Float32 images of shape (images, 8, 8, 1) in [0, 1], and their classes."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray


def small_digits(training=1440):
    """The digits, of which `training` are for training; the same split every time."""
    images, classes = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    order = np.random.default_rng(0).permutation(len(images))
    train, val = np.split(order, [training])
    return Data(images[train], classes[train], images[val], classes[val])
