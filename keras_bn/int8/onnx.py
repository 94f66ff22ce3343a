"""A `.tflite` file of integers as a file for ONNX's runtimes, in the QDQ form.

tf2onnx translates the operations, with the quantized tensors between them as pairs of
`QuantizeLinear` and `DequantizeLinear`, which a runtime merges into integer operations.
Here the graph gets what onnxruntime needs to merge every convolution:

- activations of uint8, which are those of int8 plus 128; or symmetric ones of int8;
- no bound of a ReLU between an operation and the rounding of its output. The rounding
  saturates there itself; where it does not, another one comes before the ReLU.
"""

import logging
import pathlib
import tempfile
from typing import Any

import numpy as np

from keras_bn.int8 import tflite

_OPSET = 14  # the first with HardSwish
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_GELU = "TFL_GELU"  # ONNX has one from version 20 on, tf2onnx none
_PAIR = ("QuantizeLinear", "DequantizeLinear")


def check_installed():
    """Refuse to go on without the packages of the extra `onnx`."""
    try:
        import onnxruntime  # noqa: F401
        import tf2onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "An `.onnx` file needs tf2onnx and onnxruntime: `pip install "
            f"keras_bn[onnx]`. {error}"
        ) from error


class Interpreter:
    """Makes the ONNX file of a `.tflite` file, and runs it as a `tflite.Interpreter`.

    `integers` is the interpreter of that file. `content` is the ONNX file: its inputs
    and outputs are floats, by the names of the signature.

    Raises:
        ConversionError: if tf2onnx or onnxruntime refuses it.
    """

    def __init__(self, integers, symmetric=False):
        self._integers, self._symmetric = integers, symmetric
        self.operations, self.tensors = integers.operations, integers.tensors
        self.inputs, self.outputs = integers.inputs, integers.outputs
        made = dict.fromkeys(i for each in self.operations() for i in each.tensors)
        self._shown = {f"shown{i}": i for i in made}
        try:
            self.content = self._translated(self.outputs())
            self._session = _session(self.content)
            self._shows = _session(self._translated(self._shown))
        except Exception as error:  # both packages raise whatever their parts raise
            raise tflite.ConversionError(str(error)) from error
        self._given, self._values = {}, {}

    def run(self, inputs):
        """Run one batch, a dict of arrays by the name of the input."""
        self._given = inputs
        self._values = self._run(self._session, self.outputs())

    def value(self, index):
        """A tensor after `run`, as an array of floats."""
        if index not in self._values:
            self._values = {**self._run(self._shows, self._shown), **self._values}
        return self._values[index]

    def _run(self, session, outputs):
        values = session.run(list(outputs), self._given)
        return dict(zip(outputs.values(), values, strict=True))

    def _translated(self, outputs):
        """An ONNX file with these outputs: indices of tensors by name."""
        given, made = (
            [(self.tensors[index], name) for name, index in ends.items()]
            for ends in (self.inputs(), outputs)
        )
        names = dict.fromkeys(each["name"] for each, _ in made)
        proto = _translate(self._integers.content, list(names))
        _Graph(proto.graph, self._symmetric).rewrite(given, made)
        return proto.SerializeToString()


def _translate(content, outputs):
    """What tf2onnx makes of a `.tflite` file, as an `onnx.ModelProto`."""
    import tf2onnx

    logger = logging.getLogger("tf2onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.tflite")
            path.write_bytes(content)
            proto, _ = tf2onnx.convert.from_tflite(
                str(path), output_names=outputs, opset=_OPSET
            )
    finally:
        logger.setLevel(level)
    for node in proto.graph.node:
        if (kind := node.op_type).startswith("TFL_") and kind != _GELU:
            raise ValueError(
                f"ONNX has no {kind[4:]} in {node.output[0].split(';')[0]}"
            )
    return proto


def _session(content):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(content, options, providers=providers)


class _Graph:
    """Rewrites an `onnx.GraphProto` with activations of int8."""

    def __init__(self, graph, symmetric):
        from onnx import numpy_helper

        self.graph, self.symmetric = graph, symmetric
        self.arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.nodes: list[Any] = []
        for node in graph.node:
            self.nodes += self._gelu(node) if node.op_type == _GELU else [node]

    def rewrite(self, inputs, outputs):
        """Rewrite it in place.

        The ends are pairs of what TFLite says of a tensor and of the name that it gets.
        """
        from onnx import numpy_helper

        quantize, given = zip(*(self._end(0, *each) for each in inputs), strict=True)
        dequantize, made = zip(*(self._end(1, *each) for each in outputs), strict=True)
        self.nodes = [*quantize, *self.nodes, *dequantize]
        self._requantize()
        if self.symmetric:
            self._scale_biases()
        self._saturate()
        needed, nodes = {name for _, name in outputs}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        arrays = [
            numpy_helper.from_array(array, name)
            for name, array in self.arrays.items()
            if name in needed
        ]
        self.graph.Clear()
        self.graph.name = "int8"
        self.graph.node.extend(reversed(nodes))
        self.graph.initializer.extend(arrays)
        self.graph.input.extend(given)
        self.graph.output.extend(made)

    def _end(self, kind, tensor, name):
        """The node at an input or output of floats, and what describes this."""
        from onnx import helper

        names = [name, tensor["name"]]
        first, last = names[::-1] if kind else names
        scale, zero = tensor["quantization"]
        operation, by, dtype = "Identity", [], tensor["dtype"]
        if scale:
            operation, dtype = _PAIR[kind], np.float32
            by = [self._scalar(np.float32(scale)), self._scalar(np.int8(zero))]
        node = helper.make_node(operation, [first, *by], [last])
        of = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return node, helper.make_tensor_value_info(name, of, tensor["shape"].tolist())

    def _gelu(self, node):
        """The nodes that compute what a GELU does."""
        from onnx import helper

        nodes: list[Any] = []

        def made(kind, *inputs):
            by = [
                v if isinstance(v, str) else self._scalar(np.float32(v)) for v in inputs
            ]
            nodes.append(helper.make_node(kind, by, [f"{node.output[0]} {len(nodes)}"]))
            return nodes[-1].output[0]

        x = node.input[0]
        if node.attribute[0].i:  # approximate
            cube = made("Mul", made("Mul", x, x), made("Mul", x, 0.044715))
            gate = made("Tanh", made("Mul", made("Add", x, cube), (2 / np.pi) ** 0.5))
        else:
            gate = made("Erf", made("Mul", x, 0.5**0.5))
        made("Mul", made("Mul", x, 0.5), made("Add", gate, 1.0))
        nodes[-1].output[:] = node.output
        return nodes

    def _scalar(self, value):
        """The name of a constant, which is added."""
        name = f"{value.dtype} {value}"
        self.arrays[name] = value
        return name

    def _requantize(self):
        """Let activations be uint8, or symmetric."""
        arrays, maker, done = self.arrays, self._makers(), set()
        kernels = {node.input[1] for node in self.nodes if node.op_type in _WEIGHTED}
        for node in self.nodes:
            if node.op_type not in _PAIR:
                continue
            holder = node
            while node.op_type == _PAIR[1] and holder.input[0] in maker:
                if maker[holder.input[0]].op_type in _PAIR:
                    break
                holder = maker[holder.input[0]]  # as one that picks from a constant
            value = arrays.get(holder.input[0])
            scale, zero = (arrays[name] for name in node.input[1:])
            kernel = value is not None and node.output[0] in kernels
            if zero.dtype != np.int8 or kernel:
                continue
            above = int(zero) + 128
            new: tuple[Any, Any] = scale, np.uint8(above)
            if self.symmetric:
                most = max(above, 255 - above) / 127
                new = np.float32(scale * most), np.int8(0)
            if value is not None and id(holder) not in done:
                done.add(id(holder))
                real = (value - np.float32(zero)) * (scale / new[0])
                holder.input[0] += " requantized"
                arrays[holder.input[0]] = (np.rint(real) + new[1]).astype(new[1].dtype)
            node.input[1:] = map(self._scalar, new)

    def _scale_biases(self):
        """Give each bias the scale of the products that it is added to."""
        maker, arrays = self._makers(), self.arrays
        for node in self.nodes:
            product = maker.get(node.input[0]) if node.op_type == "Add" else node
            if product is None or product.op_type not in _WEIGHTED:
                continue
            pair = [maker.get(name) for name in product.input[:2]]
            bias = maker.get(node.input[-1])
            if bias in pair or not all(map(_is_dequantized, (*pair, bias))):
                continue
            scale = np.multiply(*(arrays[each.input[1]] for each in pair))
            ratio = arrays[bias.input[1]] / scale.astype("float64")
            value = np.rint(arrays[bias.input[0]] * ratio).astype("int32")
            names = [f"{name} of {node.output[0]}" for name in bias.input[:2]]
            arrays.update(zip(names, (value, scale), strict=True))
            bias.input[:2] = names

    def _saturate(self):
        """Have no bound of a ReLU between an operation and its rounding."""
        from onnx import helper

        maker, nodes = self._makers(), []
        for node in self.nodes:
            before = maker.get(node.input[0]) if node.op_type == _PAIR[0] else None
            if before is not None and before.op_type in ("Relu", "Clip"):
                source, *bounds = before.input
                low, high = (self.arrays[n] for n in bounds) if bounds else (0, np.inf)
                scale, zero = (self.arrays[name] for name in node.input[1:])
                ends = np.iinfo(zero.dtype)
                least, most = ((e - int(zero)) * scale for e in (ends.min, ends.max))
                if low <= least and most <= high + scale / 2:
                    node.input[0] = source
                elif not _is_dequantized(maker.get(source)):
                    rounded, real, bounded = (f"{node.output[0]} {i}" for i in range(3))
                    by = list(node.input[1:])
                    nodes += [
                        helper.make_node(_PAIR[0], [source, *by], [rounded]),
                        helper.make_node(_PAIR[1], [rounded, *by], [real]),
                        helper.make_node(before.op_type, [real, *bounds], [bounded]),
                    ]
                    node.input[0] = bounded
            nodes.append(node)
        self.nodes = nodes

    def _makers(self):
        return {name: node for node in self.nodes for name in node.output}


def _is_dequantized(maker):
    return maker is not None and maker.op_type == _PAIR[1]
