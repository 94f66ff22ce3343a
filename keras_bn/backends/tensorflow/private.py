"""Every private name of TensorFlow that is used, each once, and what goes without it.

The layer works without any of them: by `tf.custom_gradient`, and by the formulas where
it cannot be known whether a graph is compiled by XLA.
"""

import importlib
from typing import Any

import tensorflow as tf


def _imported(path) -> Any:
    try:
        return importlib.import_module(path)
    except ImportError:
        return None


# `stop_recording()` and `record_operation(...)`: what a tape sees of an op. Public is
# `tf.custom_gradient`, which searches the graph for variables.
record = _imported("tensorflow.python.eager.record")
# `gradient_registry`: the gradients of graphs, which it keeps in memory for good.
_framework_ops = _imported("tensorflow.python.framework.ops")
# `GraphOrParentsInXlaContext(graph)`: no public name says what XLA compiles.
_control_flow = _imported("tensorflow.python.ops.control_flow_util")
# `mlir_quantize(...)`: the second half of `TFLiteConverter.convert`, which alone takes
# ranges other than the converter's own, and the operations that are to stay in floats.
_lite = _imported("tensorflow.lite.python.convert")
# `Model.GetRootAs(content)`: where a file has the ranges, which no public name writes.
_schema = _imported("tensorflow.lite.python.schema_py_generated")


def in_xla(graph) -> bool:
    """Whether XLA compiles a graph; True if that cannot be known."""
    ask = getattr(_control_flow, "GraphOrParentsInXlaContext", None)
    return True if ask is None else ask(graph)


def forget_gradient(name: str) -> None:
    """Take a gradient out of the registry, which has no public way to do so."""
    registry = getattr(_framework_ops, "gradient_registry", None)
    getattr(registry, "_registry", {}).pop(name, None)


def copy_function(function: Any, python_function: Any) -> Any:
    """A `tf.function` with the options of another, which has no public names for them.

    Args:
        function: the result of `tf.function`.
        python_function: what the new one compiles.
    """
    return type(function)(
        python_function,
        function._name,
        input_signature=function.input_signature,
        autograph=function._autograph,
        jit_compile=function._jit_compile,
        reduce_retracing=function._reduce_retracing,
    )


def converts_in_halves() -> bool:
    """Whether a conversion can be interrupted, by `measured` and `quantized`."""
    return hasattr(_lite, "mlir_quantize") and _schema is not None


def check_keeps_floats() -> None:
    """Refuse a TensorFlow that lacks the second half of a conversion.

    Raises:
        RuntimeError: naming its version.
    """
    if not converts_in_halves():
        raise RuntimeError(
            "`keep_float` and `lose` need a TensorFlow with `mlir_quantize`. Received: "
            f"TensorFlow {tf.__version__}"
        )


def measured(converter: tf.lite.TFLiteConverter) -> bytes:
    """The first half of a conversion: a file of floats with the samples' ranges."""
    converter._experimental_calibrate_only = True
    return converter.convert()


def ranges(content: bytearray) -> dict[int, tuple[Any, Any]]:
    """The ranges in a file that `measured` has given.

    Args:
        content: the file.

    Returns:
        By the index of the tensor, its least and its largest value: arrays of one
        element, which are views into the content.
    """
    graph = _schema.Model.GetRootAs(content, 0).Subgraphs(0)
    every = [graph.Tensors(i).Quantization() for i in range(graph.TensorsLength())]
    return {
        i: (each.MinAsNumpy(), each.MaxAsNumpy())
        for i, each in enumerate(every)
        if each is not None and each.MinLength() == 1
    }


def quantized(content: bytes, dtype: tf.DType, names: list[str]) -> bytes:
    """The second half of a conversion.

    Args:
        content: what `measured` gives.
        dtype: of the inputs and outputs of the file.
        names: of the output tensors of the operations that stay in floats.
    """
    return _lite.mlir_quantize(
        content,
        input_data_type=dtype,
        output_data_type=dtype,
        denylisted_nodes=names,
    )


def operations(interpreter: Any) -> list[dict[str, Any]]:
    """The operations of a TFLite file: `op_name`, `inputs` and `outputs` of each."""
    return interpreter._get_ops_details()
