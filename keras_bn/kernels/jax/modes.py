"""The ways JAX runs a function: eagerly, or compiled by XLA."""

import jax
import keras

MODES = ("eager", "xla")
VERSION = jax.__version__


def in_mode(function, mode, signature=None):
    """`function`, run in one of the `MODES`; see the contract of the kernels.

    It must not assign to variables. The signature has no effect: JAX knows all sizes.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
    return function if mode == "eager" else jax.jit(function)


def with_gradients(function, variables, mode, signature=None):
    """`function` and its vector-Jacobian products; see the contract of the kernels."""
    variables = list(variables)

    def pure(x, values):
        with keras.StatelessScope(zip(variables, values, strict=True)):
            return function(x)

    def gradients(x, values, upstream):
        y, vjp = jax.vjp(pure, x, values)
        dx, others = vjp(upstream)
        return y, [dx, *others]

    gradients = in_mode(gradients, mode)

    def run(x, upstream):
        x, upstream = map(keras.ops.convert_to_tensor, (x, upstream))
        return gradients(x, [v.value for v in variables], upstream)

    return run


def device() -> str:
    """Where JAX puts arrays: "CPU:0", or "GPU:0 (its name)"."""
    where = jax.devices()[0]
    label = f"{where.platform.upper()}:{where.id}"
    return label if where.platform == "cpu" else f"{label} ({where.device_kind})"
