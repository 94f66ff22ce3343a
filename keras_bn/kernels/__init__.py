"""The only entry to the kernels: the rest of the package calls these functions.

`formulas`, `layout` and `plan` are arithmetic in `keras.ops`, for any backend. A
backend's own folder has what is fast there, how a gradient is attached, how a function
is compiled and how replicas communicate. Everywhere,

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

from keras_bn.kernels.layout import broadcast
from keras_bn.kernels.plan import Plan
from keras_bn.kernels.tensorflow import modes
from keras_bn.kernels.tensorflow.batch import checked, forward
from keras_bn.kernels.tensorflow.compiled import compiled
from keras_bn.kernels.tensorflow.context import make_plan
from keras_bn.kernels.tensorflow.events import Events
from keras_bn.kernels.tensorflow.synced import active as replicated
from keras_bn.kernels.tensorflow.synced import agree, cond

__all__ = [
    "Events",
    "Plan",
    "agree",
    "broadcast",
    "checked",
    "compiled",
    "cond",
    "forward",
    "make_plan",
    "modes",
    "replicated",
]
