"""A backend on its device: a layer, a step of ResNet50, memory, accuracy, in one run.

    KERAS_BACKEND=torch python -m benchmarks.gpu --out torch.json      8 minutes
    KERAS_BACKEND=jax python -m benchmarks.gpu --out jax.json
    KERAS_BACKEND=torch python -m benchmarks.gpu --small               on a CPU

Keras's layer, ours, and `torch.nn.BatchNorm2d` or `flax.nnx.BatchNorm` are timed in
turn. It needs no TensorFlow.
"""

import argparse
import json
import platform
import subprocess
from pathlib import Path

import keras

import keras_bn
from benchmarks import backends
from keras_bn.backends import modes
from keras_bn.verify import cases, chains, judge

BACKEND = keras.backend.backend()
SHAPES = [(256, 1024), (64, 56, 56, 64), (64, 14, 14, 1024)]
SMALL = [(32, 64), (4, 8, 8, 16)]
DTYPES = ["float32", "bfloat16", "float16"]
LAYERS = {"Keras": keras.layers.BatchNormalization, "ours": keras_bn.BatchNormalization}


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
    image = (32, 2) if small else (224, 64)
    shapes, dtypes = (SMALL, DTYPES[:2]) if small else (SHAPES, DTYPES)
    results = {"backend": BACKEND, "version": modes.VERSION, "device": modes.device()}
    results["card"] = card()
    print(json.dumps(results))
    for key, measure in (
        ("accuracy", lambda: accuracy(quick=True)),
        *(
            (
                f"{'×'.join(map(str, s))} {d}, ms",
                lambda s=s, d=d: backends.layer(s, -1, d, seconds),
            )
            for s in shapes
            for d in dtypes
        ),
        ("peak memory, MB", lambda: memory(shapes[-1])),
        ("ResNet50, ms", lambda: backends.model("ResNet50", *image, seconds)),
    ):
        results[key] = measure()
        print(f"{key}: {json.dumps(results[key])}", flush=True)
        if arguments.out:  # what there is, should time run out
            Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
