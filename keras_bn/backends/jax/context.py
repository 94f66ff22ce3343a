"""How JAX runs a step.

Under `keras.distribution` a batch is one array, whichever devices hold it: statistics
are those of the whole batch, and replicas have nothing to agree on. Under
`jax.shard_map` and `jax.pmap` each device has a batch of its own, and the caller says
what becomes of their updates.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.extend
import keras
from keras import ops

from keras_bn.backends.contract import Normalizing
from keras_bn.backends.jax.replicas import mapped
from keras_bn.backends.plan import Plan
from keras_bn.moments import Tensor


def make_plan(x: Tensor, mask: Tensor | None, settings: Normalizing) -> Plan:
    """The plan for an input; see the contract of the backends."""
    size, batch = settings.group_size, x.shape[0]
    if size is not None and not isinstance(batch, int):
        raise ValueError(
            "`virtual_batch_size` cuts a batch into groups in training, and JAX has to "
            "know its size for that: export the step for a batch of a fixed size. "
            f"Received: a batch of size {batch}"
        )
    shared = settings.synchronized and mapped() is not None
    special = mask is not None or size is not None or shared or 0 in x.shape
    kernel = "plain" if special else "closed"
    return Plan(kernel, settings.axes, size, shared, xla=True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, jitted; see the contract of the backends."""
    names = inspect.signature(function).parameters.values()
    fixed = [each.name for each in names if each.kind is each.KEYWORD_ONLY]
    return jax.jit(function, static_argnames=fixed)


def cond(condition: Tensor, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """`first()` where the condition holds, else `second()`."""
    return jax.lax.cond(ops.reshape(condition, ()), first, second)


def replicated() -> bool:
    """Whether this code runs as one of several replicas: never."""
    return False


def average_updates(
    old: Sequence[Tensor | None],
    new: Sequence[Tensor | None],
    updated: Sequence[Tensor],
) -> Sequence[Tensor | None]:
    """The new state, which is the same everywhere."""
    return new


def prunes(x: Tensor) -> bool:
    """Whether unused results cost nothing: not in what is traced."""
    return isinstance(x, jax.core.Tracer)


def traced(
    function: Callable[..., Any], variables: Sequence[keras.Variable]
) -> Callable[..., Any]:
    """`function(batch, given)`, jitted for each size of batch; see the contract."""

    @jax.jit
    def pure(values, batch, given):
        present = zip(variables, values, strict=True)
        with keras.StatelessScope(present, collect_losses=True) as scope:
            result = function(batch, given)
        new = {i: scope.get_current_value(v) for i, v in enumerate(variables)}
        return result, {i: v for i, v in new.items() if v is not values[i]}

    def run(batch, given):
        result, new = pure([v.value for v in variables], batch, given)
        for i, value in new.items():
            variables[i].assign(value)
        return result

    return run


def current_trace() -> object:
    """What is being traced, as a value to compare."""
    return jax.extend.core.get_opaque_trace_state(convention="flax")


def recording(loops: bool) -> AbstractContextManager[Any]:
    """A context for values; without `jit`, `lax.scan` is a loop in Python."""
    return jax.disable_jit() if loops else contextlib.nullcontext()
