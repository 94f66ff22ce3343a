"""How JAX runs a step.

Under `keras.distribution` a batch is one array, whichever devices hold it: statistics
are those of the whole batch, and replicas have nothing to agree on.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from keras import ops

from keras_bn.backends.plan import Plan
from keras_bn.moments import Tensor


def make_plan(x, mask, settings) -> Plan:
    """The plan for an input; see the contract of the backends."""
    special = mask is not None or settings.group_size is not None or 0 in x.shape
    return Plan("plain" if special else "closed", settings.axes, settings.group_size)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the plan for its input, jitted; see the contract."""
    jitted = jax.jit(function, static_argnames=("settings", "plan"))

    @functools.wraps(function)
    def call(x, mask, *arguments, settings):
        plan = make_plan(x, mask, settings)
        return jitted(x, mask, *arguments, settings=settings, plan=plan)

    return call


def cond(condition: Tensor, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """`first()` where the condition holds, else `second()`."""
    return jax.lax.cond(ops.reshape(condition, ()), first, second)


def replicated() -> bool:
    """Whether this code runs as one of several replicas: never."""
    return False


def agree(old, new, taken):
    """The new state, which is the same everywhere."""
    return new


def pruned(x) -> bool:
    """Whether what nothing uses is left out: of what is traced, it is."""
    return isinstance(x, jax.core.Tracer)


def watched(loops: bool):
    """A context for values; without `jit`, `lax.scan` is a loop in Python."""
    return jax.disable_jit() if loops else contextlib.nullcontext()


def retrack(layer):
    """Nothing: JAX knows no layers."""
