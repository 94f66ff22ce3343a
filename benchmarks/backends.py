"""A layer and whole models on each backend of Keras, beside the backend's own layer.

    python -m benchmarks.backends                     each that is installed; 6 minutes
    python -m benchmarks.backends --python jax=ENV/bin/python
    KERAS_BACKEND=torch python -m benchmarks.backends --here        one, as JSON

The own layers are TensorFlow's fused op, `torch.nn.BatchNorm1d` and `2d`, and
`flax.nnx.BatchNorm`.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

import keras
import numpy as np

import keras_bn
from benchmarks import markdown, peers, process
from keras_bn import verify
from keras_bn.backends import modes
from keras_bn.verify import cases, chains, judge
from keras_bn.verify.timing import interleave

BACKEND = keras.backend.backend()
NAMES = {"tensorflow": "TensorFlow", "torch": "PyTorch", "jax": "JAX"}
# (shape, axis)
SHAPES = [
    ((32, 64), -1),
    ((128, 256), -1),
    ((256, 1024), -1),
    ((32, 28, 28, 128), -1),
    ((16, 56, 56, 64), -1),
    ((32, 128, 28, 28), 1),
]
# What `verify` compares for this input stands for the others.
VERIFIED = (8, 14, 14, 32)
MODELS = [("MobileNetV2", 96, 16), ("ResNet50", 96, 16)]
OWN = "own layer"


def layer(shape, axis=-1, dtype="float32", seconds=4.0):
    """Milliseconds of a training step of one layer in a chain, by who made it."""
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    makes = {
        verify.PEER: lambda: keras.layers.BatchNormalization(axis=axis, dtype=policy),
        verify.OURS: lambda: keras_bn.BatchNormalization(axis=axis, dtype=policy),
    }
    if BACKEND == "tensorflow" and axis == -1:
        makes[OWN] = peers.FusedOp
    functions = {n: chains.chain(m, shape, dtype=dtype) for n, m in makes.items()}
    if BACKEND == "torch":
        functions[OWN] = peers.torch_nn(shape, axis, dtype)
    if BACKEND == "jax" and dtype == "float32":
        functions[OWN] = peers.flax(shape, axis)
    functions = {name: each for name, each in functions.items() if each is not None}
    timings = chains.per_layer(interleave(functions, seconds), shape)
    return {name: timing.median for name, timing in timings.items()}


def model(application, size, batch, seconds=20.0):
    """Milliseconds of `train_on_batch`, by whose normalization is in the model."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, size, size, 3)).astype("float32")
    y = rng.integers(0, 10, batch)
    functions = {}
    for name in verify.PEER, verify.OURS:
        keras.utils.set_random_seed(0)
        made = getattr(keras.applications, application)(
            weights=None, input_shape=(size, size, 3), classes=10
        )
        if name == verify.OURS:
            made = keras_bn.from_keras(made)
        made.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
        functions[name] = lambda made=made: made.train_on_batch(x, y)
    return {name: t.median for name, t in interleave(functions, seconds).items()}


def errors():
    """What `keras-bn verify` finds for one input in the mode that `fit` uses.

    Returns:
        By case, `{"ours": error, "Keras": error}`: the largest of output, gradients and
        moving statistics; empty for what the backend has not.
    """
    chosen = [
        case
        for case in cases.cases()
        if case.shape == VERIFIED and case.mode == modes.USUAL
    ]
    found = {}
    for record in judge.verify(chosen):
        case = record.case
        mean = "" if case.mean == cases.MEAN else f", mean {case.mean:.0e}"
        # In inference a large moving mean is rounded, in any layer.
        checks = [c for c in record.checks if c.quantity != "inference"]
        found[case.dtype + mean] = checks and {
            "ours": max(check.ours for check in checks),
            "Keras": max(check.keras for check in checks),
        }
    return found


def here(seconds=4.0):
    """`errors`, and `layer` and `model` by name, on the backend of this process."""
    rows = {}
    for shape, axis in SHAPES:
        name = "×".join(map(str, shape)) + ("" if axis == -1 else ", channels first")
        rows[name] = layer(shape, axis, seconds=seconds)
    for application, size, batch in MODELS:
        name = f"{application}, {size}×{size}×{batch}, `train_on_batch`"
        rows[name] = model(application, size, batch, seconds=5 * seconds)
    about = {"backend": BACKEND, "version": modes.VERSION}
    return {**about, "errors": errors(), "rows": rows}


def in_process(name, python, seconds):
    """What `here` finds on a backend, in a process of this Python."""
    done = subprocess.run(
        [python, "-m", "benchmarks.backends", "--here", "--seconds", str(seconds)],
        env={**os.environ, "KERAS_BACKEND": name, "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=process.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(pythons=None, seconds=4.0):
    """What `here` finds on each backend, in a process of its own.

    Args:
        pythons: the Python of a backend, by name; this one for any other, and then a
            backend that is not installed is left out.
        seconds: to time one layer.
    """
    pythons = pythons or {}
    results = []
    for name in NAMES:
        if name not in pythons and importlib.util.find_spec(name) is None:
            print(f"{name} is not installed, and left out", file=sys.stderr)
            continue
        results.append(in_process(name, pythons.get(name, sys.executable), seconds))
    return results


def error_table(results):
    """Our error and Keras's, against float64, case by case."""
    head = ["`keras-bn verify`"]
    for result in results:
        head += [f"{NAMES[result['backend']]}: ours", "Keras's"]
    lines = []
    for case in results[0]["errors"]:
        line = [case]
        for found in (result["errors"].get(case) for result in results):
            line += [f"{found[who]:.0e}" if found else "" for who in ("ours", "Keras")]
        lines.append(line)
    return markdown.table(head, lines)


def table(results):
    """Keras's time over ours, and ours over that of the backend's own layer."""
    head = ["training step"]
    for result in results:
        name = NAMES[result["backend"]]
        head += [f"{name}: Keras / ours", "ours / own"]
    lines = []
    for row in results[0]["rows"]:
        line = [row]
        for ms in (result["rows"][row] for result in results):
            own = f"{ms[verify.OURS] / ms[OWN]:.2f}" if OWN in ms else ""
            line += [f"{ms[verify.PEER] / ms[verify.OURS]:.2f}", own]
        lines.append(line)
    return markdown.table(head, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="print the figures of this process's backend",
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="BACKEND=PATH",
        help="the Python of an environment with this backend",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="to time one layer")
    arguments = parser.parse_args(argv)
    if arguments.here:
        print(json.dumps(here(arguments.seconds)))
        return
    pythons = dict(each.split("=", 1) for each in arguments.python)
    results = measure(pythons, arguments.seconds)
    print(error_table(results), "", table(results), sep="\n")


if __name__ == "__main__":
    main()
