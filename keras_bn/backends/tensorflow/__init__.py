"""TensorFlow: its fused op, or the formulas with a gradient of our own."""

from keras_bn.backends.merging import blend
from keras_bn.backends.tensorflow import modes
from keras_bn.backends.tensorflow.batch import checked, forward, standardize
from keras_bn.backends.tensorflow.compiled import compiled
from keras_bn.backends.tensorflow.context import make_plan, pruned, retrack, watched
from keras_bn.backends.tensorflow.events import Events
from keras_bn.backends.tensorflow.offset import add_offset
from keras_bn.backends.tensorflow.synced import active as replicated
from keras_bn.backends.tensorflow.synced import agree, cond
