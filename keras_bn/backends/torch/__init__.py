"""PyTorch: its own op, differentiated by itself."""

from keras_bn.backends.events import Events
from keras_bn.backends.known import add_offset, checked
from keras_bn.backends.torch import modes
from keras_bn.backends.torch.batch import blend, forward, standardize
from keras_bn.backends.torch.context import (
    compiled,
    cond,
    make_plan,
    pruned,
    retrack,
    watched,
)
from keras_bn.backends.torch.replicas import agree
from keras_bn.backends.torch.replicas import in_step as replicated
