"""The ways TensorFlow runs a function: eagerly, as a graph, compiled by XLA."""

import tensorflow as tf

MODES = ("eager", "graph", "xla")
TENSORFLOW_VERSION = tf.__version__


def in_mode(function, mode, signature=None):
    """`function`, to be run in one of the `MODES`.

    Args:
        function: takes and returns tensors.
        mode: "eager", "graph" for a `tf.function`, or "xla" for one with
            `jit_compile=True`.
        signature: what is known of its arguments while tracing: a list of
            `(shape, dtype)`, with None for unknown sizes; by default, everything.

    Returns:
        A function of the same arguments.

    Raises:
        ValueError: for any other mode.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
    if mode == "eager":
        return function
    specs = None if signature is None else [tf.TensorSpec(*each) for each in signature]
    return tf.function(
        function,
        input_signature=specs,
        jit_compile=mode == "xla",
        autograph=False,
    )


def with_gradients(function, variables, mode, signature=None):
    """`function` and its vector-Jacobian products, to be run in one of the `MODES`.

    Args:
        function: takes one tensor `x` and returns one tensor.
        variables: Keras variables that `function` reads.
        mode, signature: as for `in_mode`; of `x` and the upstream gradient.

    Returns:
        A function of `x` and an upstream gradient of the shape and dtype of the
        output. It returns the output and a list: the gradients of
        `sum(upstream * output)` with respect to `x` and to each variable.
    """
    values = [variable.value for variable in variables]

    def run(x, upstream):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, *values])
            y = function(x)
        return y, tape.gradient(y, [x, *values], output_gradients=upstream)

    return in_mode(run, mode, signature)


def device() -> str:
    """Where TensorFlow runs ops by default: "CPU:0", or "GPU:0 (its name)"."""
    spec = tf.DeviceSpec.from_string(tf.zeros([]).device)
    label = f"{spec.device_type}:{spec.device_index}"
    physical = tf.config.list_physical_devices(spec.device_type)[spec.device_index]
    name = tf.config.experimental.get_device_details(physical).get("device_name")
    return f"{label} ({name})" if name else label
