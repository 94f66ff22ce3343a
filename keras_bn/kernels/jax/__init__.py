"""JAX: formulas, differentiated and compiled by itself."""

from keras_bn.kernels.events import Events
from keras_bn.kernels.jax import modes
from keras_bn.kernels.jax.batch import forward, standardize
from keras_bn.kernels.jax.context import (
    add_offset,
    agree,
    checked,
    compiled,
    cond,
    make_plan,
    pruned,
    replicated,
    retrack,
)

__all__ = [
    "Events",
    "add_offset",
    "agree",
    "checked",
    "compiled",
    "cond",
    "forward",
    "make_plan",
    "modes",
    "pruned",
    "replicated",
    "retrack",
    "standardize",
]
