"""The ways JAX runs a function: eagerly, or compiled by XLA."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras

from keras_bn.backends.contract import Signature

MODES = ("eager", "xla")
USUAL = "xla"
SUMS_IN_ORDER = False
VERSION = jax.__version__


def in_mode(
    function: Callable[..., Any],
    variables: Sequence[Any],
    mode: str,
    signature: Signature | None = None,
) -> Callable[..., Any]:
    """`function`, run in one of the `MODES`; see the contract of the backends.

    The signature has no effect: JAX knows all sizes.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
    if mode == "eager":
        return function
    return _assigning(jax.jit(_pure(function, variables)), variables)


def with_gradients(
    function: Callable[..., Any],
    variables: Sequence[Any],
    mode: str,
    signature: Signature | None = None,
) -> Callable[..., Any]:
    """`function` and its vector-Jacobian products; see the contract of the backends."""
    in_mode(function, variables, mode)
    pure = _pure(function, variables)
    trained = [i for i, v in enumerate(variables) if v.trainable]

    def run(values, x, upstream):
        def inner(x, some):
            present = dict(zip(trained, some, strict=True))
            return pure([present.get(i, v) for i, v in enumerate(values)], x)

        y, vjp, new = jax.vjp(inner, x, [values[i] for i in trained], has_aux=True)
        dx, others = vjp(upstream)
        return (y, [dx, *others]), new

    return _assigning(run if mode == "eager" else jax.jit(run), variables)


def wait(result: Any) -> Any:
    """The result, when it has been computed."""
    return jax.block_until_ready(result)


def device() -> str:
    """Where JAX puts arrays: "CPU:0", or "GPU:0 (its name)"."""
    where = jax.devices()[0]
    label = f"{where.platform.upper()}:{where.id}"
    return label if where.platform == "cpu" else f"{label} ({where.device_kind})"


def _pure(function, variables):
    """The function of values for the variables that gives its result and new values."""

    def run(values, *arguments):
        with keras.StatelessScope(zip(variables, values, strict=True)) as scope:
            result = function(*arguments)
        return result, [scope.get_current_value(v) for v in variables]

    return run


def _assigning(pure, variables):
    """The function with its effect on the variables."""

    def run(*arguments):
        tensors = map(keras.ops.convert_to_tensor, arguments)
        result, new = pure([v.value for v in variables], *tensors)
        for variable, value in zip(variables, new, strict=True):
            if not variable.trainable:
                variable.assign(value)
        return result

    return run
