"""PyTorch: its own op, differentiated by itself."""

from keras_bn.kernels.events import Events
from keras_bn.kernels.known import add_offset, checked
from keras_bn.kernels.torch import modes
from keras_bn.kernels.torch.batch import blend, forward, standardize
from keras_bn.kernels.torch.context import (
    compiled,
    cond,
    make_plan,
    pruned,
    retrack,
    watched,
)
from keras_bn.kernels.torch.replicas import agree
from keras_bn.kernels.torch.replicas import in_step as replicated
