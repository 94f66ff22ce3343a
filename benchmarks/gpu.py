"""A backend on its device: a layer, a step of ResNet50, memory, accuracy, in one run.

    KERAS_BACKEND=torch python -m benchmarks.gpu --out torch.json      8 minutes
    KERAS_BACKEND=jax python -m benchmarks.gpu --out jax.json
    KERAS_BACKEND=torch python -m benchmarks.gpu --small               on a CPU

Keras's layer and ours are timed in turn, on PyTorch beside `torch.nn.BatchNorm2d`. It
needs no TensorFlow.
"""

import argparse
import json
import platform
import subprocess
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_bn
from keras_bn.bench import chains
from keras_bn.bench.timing import interleave
from keras_bn.kernels import modes
from keras_bn.proof import cases, judge

BACKEND = keras.backend.backend()
SHAPES = [(256, 1024), (64, 56, 56, 64), (64, 14, 14, 1024)]
SMALL = [(32, 64), (4, 8, 8, 16)]
DTYPES = ["float32", "bfloat16", "float16"]
LAYERS = {"Keras": keras.layers.BatchNormalization, "ours": keras_bn.BatchNormalization}


def layer(shape, dtype, seconds):
    """Milliseconds of a training step of one layer, by name."""
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    functions = {
        name: chains.chain(
            lambda cls=cls: cls(dtype=policy), shape, modes.USUAL, dtype=dtype
        )
        for name, cls in LAYERS.items()
    }
    if BACKEND == "torch":
        functions["torch.nn"] = torch_chain(shape, dtype)
    timings = chains.per_layer(interleave(functions, seconds), shape)
    return {name: timing.median for name, timing in timings.items()}


def torch_chain(shape, dtype):
    """The same chain of PyTorch's own layers."""
    import torch

    kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    rng = np.random.default_rng(0)
    draws = [rng.normal(size=shape).astype("float32") for _ in range(2)]
    x, upstream = (ops.convert_to_tensor(each, dtype) for each in draws)
    layers = [kind(shape[-1], device=x.device) for _ in range(chains.depth(shape))]
    weights = [weight for each in layers for weight in each.parameters()]

    def run():
        y = start = x.detach().requires_grad_()
        for each in layers:
            y = each(y.movedim(-1, 1)).movedim(1, -1)
        return modes.wait(torch.autograd.grad(y, [start, *weights], upstream))

    return run


def resnet(size, batch, seconds):
    """Milliseconds of `train_on_batch` of ResNet50, by the layer in it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, size, size, 3)).astype("float32")
    y = rng.integers(0, 10, batch)
    functions = {}
    for name in LAYERS:
        keras.utils.set_random_seed(0)
        model = keras.applications.ResNet50(
            weights=None, input_shape=(size, size, 3), classes=10
        )
        if name == "ours":
            model = keras_bn.from_keras(model)
        model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
        functions[name] = lambda model=model: model.train_on_batch(x, y)
    return {name: t.median for name, t in interleave(functions, seconds).items()}


def memory(shape):
    """The largest memory of a training step, in MB, by name; None on a CPU."""
    if BACKEND != "torch" or not modes.device().startswith("GPU"):
        return None
    import torch

    peaks = {}
    for name, cls in LAYERS.items():
        step = chains.chain(cls, shape)
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return peaks


def accuracy(quick):
    """What `keras-bn verify` finds, large means included."""
    records = list(judge.verify(cases.cases(quick)))
    failed = [r.to_dict() for r in records if r.verdict == "FAIL"]
    return {"passed": judge.passed(records), "of": len(records), "failed": failed}


def card():
    """The name of the GPU, or of the processor."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    return found.stdout.strip()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each timing")
    parser.add_argument("--out", help="a JSON file for what is measured")
    arguments = parser.parse_args(argv)
    small = arguments.small
    seconds = min(arguments.seconds, 1.0) if small else arguments.seconds
    shapes, dtypes = (SMALL, DTYPES[:2]) if small else (SHAPES, DTYPES)
    results = {"backend": BACKEND, "version": modes.VERSION, "device": modes.device()}
    results["card"] = card()
    print(json.dumps(results))
    for key, measure in (
        ("accuracy", lambda: accuracy(quick=True)),
        *(
            (f"{'×'.join(map(str, s))} {d}, ms", lambda s=s, d=d: layer(s, d, seconds))
            for s in shapes
            for d in dtypes
        ),
        ("peak memory, MB", lambda: memory(shapes[-1])),
        ("ResNet50, ms", lambda: resnet(*((32, 2) if small else (224, 64)), seconds)),
    ):
        results[key] = measure()
        print(f"{key}: {json.dumps(results[key])}", flush=True)
        if arguments.out:  # what there is, should time run out
            Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
