"""All but `fold` in five minutes, into RESULTS.md, results.json and ratios.png."""

import argparse
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

from benchmarks import layer, memory, models, sync
from keras_bn.version import __version__

HERE = Path(__file__).parent
SECONDS = 3.0
# XLA takes ten seconds to compile a chain: these alone, unless all are asked for.
COMPILED = [
    (32, 64),
    (128, 256),
    (256, 1024),
    (32, 28, 28, 128),
    (32, 128, 28, 28),
    (16, 56, 56, 64),
]


def machine():
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next(s.split(": ")[1] for s in lines if s.startswith("model name"))
    load = os.getloadavg()[0]
    return (
        f"{name}, {os.cpu_count()} cores (load {load:.1f} at the start), "
        f"Python {platform.python_version()}, TensorFlow {tf.__version__}, "
        f"Keras {keras.__version__}, keras_bn {__version__}"
    )


def plot(graph, jit, path):
    """Keras's time over ours, shape by shape; without matplotlib, nothing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        return
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    names = [layer.name(row) for row in graph]
    for rows, shift, label in ((graph, -0.2, "graph mode"), (jit, 0.2, "under XLA")):
        places = [names.index(layer.name(row)) + shift for row in rows]
        axes.barh(places, [r["ratio"] for r in rows], height=0.4, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.legend()
    axes.set_xlabel("Keras's time / keras_bn's, training step")
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full",
        action="store_true",
        help="every shape under XLA, half precision, models at 128×128: 12 minutes",
    )
    full = parser.parse_args(argv).full
    where = machine()
    print(where)
    shapes = layer.SHAPES
    graph = layer.main(["--seconds", str(SECONDS)])
    jit = [
        layer.measure(shape, axis, "jit_compile", SECONDS)
        for shape, axis in shapes
        if full or shape in COMPILED
    ]
    large = (32, 28, 28, 128)
    eager = [
        layer.measure(large, -1, "eager", SECONDS, backward=backward)
        for backward in (True, False)
    ]
    inference = [
        layer.measure(shape, axis, seconds=SECONDS / 2, training=False)
        for shape, axis in shapes
    ]
    parts = {"Training step, graph mode": graph, "The same under XLA": jit}
    parts |= {"The same, eager; then forward alone": eager}
    parts |= {"Inference, graph mode": inference}
    if full:
        for policy in ("mixed_bfloat16", "mixed_float16"):
            parts[f"Training step, {policy}"] = [
                layer.measure(shape, axis, seconds=SECONDS / 2, dtype=policy)
                for shape, axis in shapes
            ]
    whole = models.main(["--rounds", "4"])
    if full:
        whole += models.main(["--rounds", "3", "--size", "128", "--batch", "32"])
    peak = memory.main([])
    shared = sync.in_a_process(SECONDS)
    text = ["# Results", "", where + ".", ""]
    text += ["Milliseconds per layer in a chain, medians of interleaved rounds.", ""]
    for title, rows in parts.items():
        text += [f"## {title}", "", layer.table(rows), ""]
    text += ["## Whole models, `fit`", "", models.table(whole), ""]
    text += ["## Two replicas, apart and synchronized", "", sync.table(shared), ""]
    text += ["## Peak memory of a training step", ""]
    text += [f"{peak['ratio']:.2f} of Keras's, {memory.LAYERS} layers of "]
    text[-1] += f"{memory.SHAPE}."
    (HERE / "RESULTS.md").write_text("\n".join(text) + "\n")
    results = {"machine": where, **parts, "models": whole, "memory": peak}
    results |= {"synchronization": shared}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(graph, jit, HERE / "ratios.png")


if __name__ == "__main__":
    main()
