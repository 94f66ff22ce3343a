"""The one entry to the kernels: everything above here calls these functions.

This folder is the only place that names TensorFlow. In all of it

- `x` is the input, `(batch, ..., channels)` or with the channels elsewhere;
- `axes` are the channel axes, non-negative and ascending: usually one;
- a statistic or parameter has one value per channel: the shape of `x` along `axes`.
"""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_bn runs on Keras's TensorFlow backend. Received: KERAS_BACKEND="
        f"{keras.backend.backend()!r}; set it to 'tensorflow' before importing keras."
    )

from keras_bn.kernels.batch import normalize_batch
from keras_bn.kernels.compiled import compiled
from keras_bn.kernels.events import Events
from keras_bn.kernels.plain import affine, normalize_with
from keras_bn.kernels.synced import active as replicated
from keras_bn.kernels.synced import agree, choose

__all__ = [
    "Events",
    "affine",
    "agree",
    "choose",
    "compiled",
    "normalize_batch",
    "normalize_with",
    "replicated",
]
