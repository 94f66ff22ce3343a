"""The five-minute version of all of them, into RESULTS.md, results.json, ratios.png."""

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
SECONDS = 4.0


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


def plot(rows, path):
    """Keras's time over ours, shape by shape; without matplotlib, nothing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        return
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.barh([str(tuple(r["shape"])) for r in rows], [r["ratio"] for r in rows])
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("Keras's time / keras_bn's, training step in graph mode")
    figure.savefig(path, dpi=120)


def main():
    where = machine()
    print(where)
    graph = layer.main(["--seconds", str(SECONDS)])
    jit = [
        layer.measure(shape, axis, "jit_compile", SECONDS)
        for shape, axis in layer.SHAPES
        if shape in ((128, 256), (256, 1024), (32, 28, 28, 128), (16, 56, 56, 64))
    ]
    eager = [layer.measure((32, 28, 28, 128), -1, "eager", SECONDS)]
    inference = [
        layer.measure(shape, axis, seconds=SECONDS / 2, training=False)
        for shape, axis in layer.SHAPES
    ]
    whole = models.main(["--rounds", "3"])
    peak = memory.main([])
    shared = sync.in_a_process(SECONDS)
    parts = {"Training step, graph mode": graph, "The same under XLA": jit}
    parts |= {"The same, eager": eager, "Inference, graph mode": inference}
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
    plot(graph, HERE / "ratios.png")


if __name__ == "__main__":
    main()
