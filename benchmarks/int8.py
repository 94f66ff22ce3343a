"""Files of integers against files of floats: their size, and the time for one image.

    python -m benchmarks.int8 [--application NAME] [--size 96] [--seconds 10] [--onnx]

Both are of the folded model and run in one thread, in turn: in TensorFlow's
interpreter, or with `--onnx` in onnxruntime.
"""

import argparse
import functools

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from benchmarks import markdown
from keras_bn import verify
from keras_bn.int8.export import integer_file

APPLICATIONS = ("MobileNetV2", "ResNet50")
FLOAT, INT8 = "float", "int8"


def measure(application, size, seconds=10.0, onnx=False):
    """Bytes of both files, and milliseconds for one image, with their ratios."""
    keras.utils.set_random_seed(0)
    named = isinstance(application, str)
    make = getattr(keras.applications, application) if named else application
    model = make(weights=None, input_shape=(size, size, 3), classes=10)
    x = np.random.default_rng(0).uniform(-1, 1, (16, size, size, 3)).astype("float32")
    suffix, run = (".onnx", onnx_runner) if onnx else (".tflite", runner)
    integers = integer_file(model, x, suffix=suffix)[0]
    files = {FLOAT: float_file(model, onnx), INT8: integers}
    functions = {kind: run(content, x[:1]) for kind, content in files.items()}
    timings = verify.interleave(functions, seconds)
    sizes = {kind: len(content) for kind, content in files.items()}
    return {
        "model": application,
        "size": size,
        "bytes": sizes,
        "ms": {kind: each._asdict() for kind, each in timings.items()},
        "smaller": sizes[INT8] / sizes[FLOAT],
        "ratio": timings[INT8].median / timings[FLOAT].median,
    }


def float_file(model, onnx=False):
    """The folded model as a `.tflite` or `.onnx` file of floats, for one image."""
    folded = keras_bn.fold(model)
    (given,) = folded.inputs
    spec = tf.TensorSpec((1, *given.shape[1:]), given.dtype)
    function = tf.function(lambda x: folded(x, training=False), input_signature=[spec])
    if onnx:
        import tf2onnx

        proto, _ = tf2onnx.convert.from_function(function, [spec], opset=14)
        return proto.SerializeToString()
    concrete = function.get_concrete_function()
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete], folded).convert()


def runner(content, image):
    """A function that runs a file once."""
    interpreter = tf.lite.Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    scale, zero = given["quantization"]
    value = np.rint(image / scale) + zero if scale else image
    interpreter.set_tensor(given["index"], value.astype(given["dtype"]))
    return interpreter.invoke


def onnx_runner(content, image):
    """A function that runs an `.onnx` file once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(content, options, providers)
    return functools.partial(session.run, None, {session.get_inputs()[0].name: image})


def table(rows):
    """The rows of `measure` as a table in Markdown."""
    head = ["model", "float, MB", "int8, MB", "int8 / float"]
    head += ["an image, float, ms", "int8, ms", "int8 / float"]
    return markdown.table(
        head,
        [
            [
                f"{row['model']}, {row['size']}×{row['size']}",
                *(f"{row['bytes'][kind] / 1e6:.1f}" for kind in (FLOAT, INT8)),
                f"{row['smaller']:.2f}",
                *(f"{row['ms'][kind]['median']:.2f}" for kind in (FLOAT, INT8)),
                f"{row['ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--application", metavar="NAME", help="this model alone")
    parser.add_argument("--size", type=int, default=96, help="side of its images")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing")
    parser.add_argument("--onnx", action="store_true", help="files for onnxruntime")
    given = parser.parse_args(argv)
    chosen = [given.application] if given.application else APPLICATIONS
    options = given.size, given.seconds, given.onnx
    print(table([measure(each, *options) for each in chosen]))


if __name__ == "__main__":
    main()
