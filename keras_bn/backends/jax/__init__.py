"""JAX: formulas, differentiated and compiled by itself."""

from keras_bn.backends.events import Events
from keras_bn.backends.jax import modes
from keras_bn.backends.jax.batch import forward, standardize
from keras_bn.backends.jax.context import (
    agree,
    compiled,
    cond,
    make_plan,
    pruned,
    replicated,
    retrack,
    watched,
)
from keras_bn.backends.known import add_offset, checked
from keras_bn.backends.merging import blend
