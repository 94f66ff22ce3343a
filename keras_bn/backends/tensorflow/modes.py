"""The ways TensorFlow runs a function: eagerly, as a graph, compiled by XLA."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_bn.backends.contract import Signature

MODES = ("eager", "graph", "xla")
USUAL = "graph"
SUMS_IN_ORDER = False
VERSION = tf.__version__


def in_mode(
    function: Callable[..., Any],
    variables: Sequence[Any],
    mode: str,
    signature: Signature | None = None,
) -> Callable[..., Any]:
    """`function`, run in one of the `MODES`; see the contract of the backends."""
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
    if mode == "eager":
        return function
    specs = None if signature is None else [tf.TensorSpec(*each) for each in signature]
    return tf.function(
        function, input_signature=specs, jit_compile=mode == "xla", autograph=False
    )


def with_gradients(
    function: Callable[..., Any],
    variables: Sequence[Any],
    mode: str,
    signature: Signature | None = None,
) -> Callable[..., Any]:
    """`function` and its vector-Jacobian products; see the contract of the backends."""
    values = [variable.value for variable in variables if variable.trainable]

    def run(x, upstream):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, *values])
            y = function(x)
        return y, tape.gradient(y, [x, *values], output_gradients=upstream)

    return in_mode(run, variables, mode, signature)


def wait(result: Any) -> Any:
    """The result."""
    return result


def device() -> str:
    """Where TensorFlow runs ops by default: "CPU:0", or "GPU:0 (its name)"."""
    spec = tf.DeviceSpec.from_string(tf.zeros([]).device)
    label = f"{spec.device_type}:{spec.device_index}"
    physical = tf.config.list_physical_devices(spec.device_type)[spec.device_index]
    name = tf.config.experimental.get_device_details(physical).get("device_name")
    return f"{label} ({name})" if name else label
