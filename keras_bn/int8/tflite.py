"""TensorFlow's converter to TFLite, and the interpreter that runs what it makes.

The only place that names either. The interpreter is LiteRT's (`ai_edge_litert`) if that
is installed, and TensorFlow's otherwise.
"""

import contextlib
import functools
import gc
import itertools
import os
import re
import signal
import sys
import warnings
from typing import NamedTuple

import keras
import numpy as np


class ConversionError(Exception):
    """The converter's own message, if it refuses a model."""


class RunError(Exception):
    """What the interpreter says where an operation fails, with its place or -1."""

    def __init__(self, message, operation=-1):
        super().__init__(message)
        self.operation = operation


class Operation(NamedTuple):
    """One operation of a file."""

    name: str  # as "CONV_2D"
    outputs: tuple[str, ...]  # the names of its output tensors
    tensors: tuple[int, ...]  # the indices of its output tensors
    inputs: tuple[int, ...]  # the indices of its input tensors
    dtypes: frozenset  # of its inputs and outputs


def check_backend(what):
    """Refuse a backend other than TensorFlow, in the name of a function."""
    if (backend := keras.backend.backend()) != "tensorflow":
        raise RuntimeError(
            f"`{what}` needs Keras's TensorFlow backend, since TensorFlow's converter "
            "makes the file: run it on the saved model with KERAS_BACKEND=tensorflow. "
            f"The backend is {backend!r}."
        )


# The converters before lose what follows a fake quantization.
OLDEST_AWARE = (2, 17)


def check_aware(what):
    """Refuse a TensorFlow whose converter can't take fake quantization."""
    import tensorflow as tf

    version = tuple(int(part) for part in tf.__version__.split(".")[:2])
    if version < OLDEST_AWARE:
        raise RuntimeError(
            f"`{what}` needs TensorFlow {'.'.join(map(str, OLDEST_AWARE))} or newer, "
            f"for its converter. Received: TensorFlow {tf.__version__}"
        )


def scope(name):
    """A name scope, which the names of tensors in the file will contain."""
    import tensorflow as tf

    return tf.name_scope(name)


def compiled(function):
    """A function of a list of tensors as a graph, from arrays to arrays."""
    import tensorflow as tf

    options = {"autograph": False, "reduce_retracing": True}
    graph = tf.function(lambda *inputs: function(list(inputs)), **options)

    def compute(arrays):
        outputs = graph(*map(keras.ops.convert_to_tensor, arrays))
        return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)

    return compute


def convert(function, inputs, samples=None, bits=8, floats=None):
    """A function of tensors as the content of a file of integers.

    Args:
        function: takes a tensor for each input, and gives a dict of tensors by name.
        inputs: dict of arrays as it takes them, by the name of the input.
        samples: gives an iterator of such dicts to measure ranges with; None if the
            function has fake quantization everywhere.
        bits: of the activations with `samples`, 8 or 16.
        floats: None if nothing may stay in floats. Otherwise what has no counterpart of
            integers does; and at 8 bits, those operations whose output tensors this
            function names. It gets the `Interpreter` of a file all in floats.
    """
    import tensorflow as tf

    from keras_bn.backends.tensorflow import private

    if floats is not None and bits == 8:
        private.check_keeps_floats()
    halved = samples is not None and bits == 8 and private.converts_in_halves()
    specs = [tf.TensorSpec(x.shape, x.dtype, name) for name, x in inputs.items()]
    traced = tf.function(function, input_signature=specs, autograph=False)
    concrete = traced.get_concrete_function()
    _check_loops(concrete)
    # The converter writes signatures only if this holds all that is captured.
    holder = tf.Module()
    holder.captured = list(concrete.graph.variables)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], holder)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    dtype = tf.int8 if bits == 8 else tf.int16
    converter.inference_input_type = converter.inference_output_type = dtype
    if samples is not None:
        first = functools.partial(itertools.islice, samples(), 1)
        converter.representative_dataset = first if halved else samples
        sets = tf.lite.OpsSet
        wide = sets.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        builtin = [] if floats is None else [sets.TFLITE_BUILTINS]
        integer = sets.TFLITE_BUILTINS_INT8 if bits == 8 else wide
        converter.target_spec.supported_ops = [integer, *builtin]
    try:
        if not halved:
            return converter.convert()
        content = _measured(private.measured(converter), samples())
        names = [] if floats is None else floats(Interpreter(content))
        return private.quantized(content, dtype, names)
    except Exception as error:  # it raises whatever its parts raise
        message = f"{error}{_named(concrete, str(error))}"
        raise ConversionError(message) from error


def _measured(content, samples):
    """A file of floats with the ranges of the samples, each as after its operation.

    The converter's own are wrong for what goes into an operation in place, such as an
    addition: it takes those of the result in (issue 127842 of TensorFlow).
    """
    from keras_bn.backends.tensorflow import private

    content, interpreter = bytearray(content), Interpreter(content)
    ranges = private.ranges(content)
    for least, most in ranges.values():
        least[:], most[:] = np.inf, -np.inf
    for inputs in samples:
        interpreter.run(inputs)
        for index, (least, most) in ranges.items():
            value = interpreter.value(index)
            np.minimum(least, value.min(), out=least)
            np.maximum(most, value.max(), out=most)
    return bytes(content)


def _named(concrete, message):
    """The names of the operations whose kinds a message names, as `'tf.Erf'`."""
    kinds = re.findall(r"\btf\.(\w+)", message)
    every = concrete.graph.get_operations()
    names = [operation.name for operation in every if operation.type in kinds]
    return f"\nin {', '.join(names)}" if names else ""


def _check_loops(concrete):
    """Refuse loops and conditionals, with which the converter may end the process."""
    for operation in concrete.graph.get_operations():
        if operation.type.removeprefix("Stateless") in ("While", "If", "Case"):
            raise ConversionError(f"{operation.type} in {operation.name}")


class Interpreter:
    """Runs a file, the bytes in `content`, and shows every tensor."""

    def __init__(self, content):
        self.content = content
        kind, resolver = _interpreter()
        with warnings.catch_warnings():
            # TensorFlow asks callers of this class to take LiteRT's, as is done here.
            warnings.filterwarnings("ignore", r"\s*Warning: tf\.lite\.Interpreter")
            self._interpreter = kind(
                model_content=content,
                # Delegates would keep the tensors between operations to themselves.
                experimental_op_resolver_type=resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
                experimental_preserve_all_tensors=True,
            )
        self._interpreter.allocate_tensors()
        runner = self._interpreter.get_signature_runner()
        self._inputs = runner.get_input_details()
        self._outputs = runner.get_output_details()

    def operations(self):
        """The operations of the file, in order, as a list of `Operation`."""
        from keras_bn.backends.tensorflow import private

        operations = []
        for each in private.operations(self._interpreter):
            inputs, outputs = (tuple(map(int, each[k])) for k in ("inputs", "outputs"))
            names = tuple(self.tensors[i]["name"] for i in outputs)
            # An input that is left out is -1.
            tensors = [self.tensors[i] for i in (*inputs, *outputs) if i >= 0]
            dtypes = frozenset(np.dtype(tensor["dtype"]).name for tensor in tensors)
            operations.append(
                Operation(each["op_name"], names, outputs, inputs, dtypes)
            )
        return operations

    def inputs(self):
        """The index of each input's tensor, by the name of the input."""
        return {name: int(detail["index"]) for name, detail in self._inputs.items()}

    def outputs(self):
        """The index of each output's tensor, by the name of the output."""
        return {name: int(detail["index"]) for name, detail in self._outputs.items()}

    def run(self, inputs):
        """Run one batch, a dict of arrays by input; those of floats are quantized."""
        for name, index in self.inputs().items():
            value = _quantized(inputs[name], self.tensors[index])
            self._interpreter.set_tensor(index, value)
        try:
            self._interpreter.invoke()
        except RuntimeError as error:
            number = re.search(r"Node number (\d+)", str(error))
            message = str(error).replace(".Node", ". Node")
            raise RunError(message, int(number[1]) if number else -1) from error

    def value(self, index):
        """A tensor after `run`, as an array of floats."""
        value = self._interpreter.get_tensor(index)
        scale, zero_point = self.tensors[index]["quantization"]
        if not scale:
            return value
        return (value.astype("float32") - zero_point) * np.float32(scale)

    @functools.cached_property
    def tensors(self):
        """What TFLite says of each tensor, by its index."""
        details = self._interpreter.get_tensor_details()
        return {int(detail["index"]): detail for detail in details}


# How long a file may take to run once, in seconds.
_PATIENCE = 60


def check_runs(content, inputs):
    """Run a file once in a process of its own; a `RunError` if it ends the process.

    Only on Linux, where a process is copied in milliseconds.
    """
    if sys.platform != "linux":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the copy does not use
        child = os.fork()
    if not child:
        gc.disable()  # TensorFlow's objects need its threads to end
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_PATIENCE)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            Interpreter(content).run(inputs)
        os._exit(0)  # what raises is raised again where it is wanted
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGALRM:
        name = signal.Signals(os.WTERMSIG(status)).name
        raise RunError(f"it ends the process that runs it by {name}")


def _quantized(x, detail):
    """An array as a tensor of a file takes it."""
    x, dtype = np.asarray(x), np.dtype(detail["dtype"])
    scale, zero_point = detail["quantization"]
    if not scale or not np.issubdtype(x.dtype, np.floating):
        return x.astype(dtype)
    value, bounds = np.rint(x / scale) + zero_point, np.iinfo(dtype)
    return np.clip(value, bounds.min, bounds.max).astype(dtype)


def _interpreter():
    """The class of the interpreter, and of its resolvers."""
    try:
        from ai_edge_litert import interpreter as litert
    except ImportError:
        import tensorflow as tf

        return tf.lite.Interpreter, tf.lite.experimental.OpResolverType
    return litert.Interpreter, litert.OpResolverType
