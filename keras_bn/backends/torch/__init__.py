"""PyTorch: its own op, differentiated by itself."""

from keras_bn.backends.layout import add_offset, assert_mask_shape, dense
from keras_bn.backends.torch import modes
from keras_bn.backends.torch.batch import blend, forward, moments, standardize
from keras_bn.backends.torch.context import (
    compiled,
    cond,
    current_trace,
    make_plan,
    prunes,
    recording,
    traced,
)
from keras_bn.backends.torch.replicas import average_updates
from keras_bn.backends.torch.replicas import in_step as replicated
