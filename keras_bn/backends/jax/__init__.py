"""JAX: formulas, differentiated and compiled by itself."""

from keras_bn.backends.averages import blend
from keras_bn.backends.jax import modes
from keras_bn.backends.jax.batch import forward, moments, standardize
from keras_bn.backends.jax.context import (
    average_updates,
    compiled,
    cond,
    current_trace,
    make_plan,
    prunes,
    recording,
    replicated,
    traced,
)
from keras_bn.backends.layout import add_offset, assert_mask_shape, dense
