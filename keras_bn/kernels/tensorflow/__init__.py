"""TensorFlow: its fused op, or the formulas with a gradient of our own."""

from keras_bn.kernels.merging import blend
from keras_bn.kernels.tensorflow import modes
from keras_bn.kernels.tensorflow.batch import checked, forward, standardize
from keras_bn.kernels.tensorflow.compiled import compiled
from keras_bn.kernels.tensorflow.context import make_plan, pruned, retrack, watched
from keras_bn.kernels.tensorflow.events import Events
from keras_bn.kernels.tensorflow.offset import add_offset
from keras_bn.kernels.tensorflow.synced import active as replicated
from keras_bn.kernels.tensorflow.synced import agree, cond
