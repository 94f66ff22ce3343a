"""JAX: formulas, differentiated and compiled by itself."""

from keras_bn.kernels.events import Events
from keras_bn.kernels.jax import modes
from keras_bn.kernels.jax.batch import forward, standardize
from keras_bn.kernels.jax.context import (
    agree,
    compiled,
    cond,
    make_plan,
    pruned,
    replicated,
    retrack,
    watched,
)
from keras_bn.kernels.known import add_offset, checked
from keras_bn.kernels.merging import blend
