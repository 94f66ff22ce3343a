"""scikit-learn's handwritten digits."""

import dataclasses

import numpy as np
from sklearn.datasets import load_digits


@dataclasses.dataclass
class Data:
    """Images in [0, 1] and their classes, to train on and to validate with."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray


def small_digits(training=1440):
    """The digits, of which `training` are for training; the same split every time.

    Images are float32, of shape (images, 8, 8, 1): with the channel axis that
    convolutions take.
    """
    images, classes = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    order = np.random.default_rng(0).permutation(len(images))
    train, val = np.split(order, [training])
    return Data(images[train], classes[train], images[val], classes[val])
