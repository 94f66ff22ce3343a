"""TensorFlow: its fused op, or the formulas with a gradient of our own."""

from keras_bn.backends.averages import blend
from keras_bn.backends.tensorflow import modes
from keras_bn.backends.tensorflow.batch import (
    assert_mask_shape,
    forward,
    moments,
    standardize,
)
from keras_bn.backends.tensorflow.compiled import compiled, traced
from keras_bn.backends.tensorflow.context import (
    current_trace,
    make_plan,
    prunes,
    recording,
)
from keras_bn.backends.tensorflow.offset import add_offset
from keras_bn.backends.tensorflow.ragged import dense
from keras_bn.backends.tensorflow.synced import active as replicated
from keras_bn.backends.tensorflow.synced import average_updates, cond
