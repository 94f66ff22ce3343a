"""All but `fold` and `int8`: RESULTS.md, results.json, ratios.png, in five minutes."""

import argparse
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

from benchmarks import applications, first, frozen, layer, memory, models, sync
from keras_bn.version import __version__

HERE = Path(__file__).parent
# XLA takes ten seconds to compile a chain: these alone, unless all are asked for.
COMPILED = [(32, 64), (512, 768), (32, 28, 28, 128)]
LARGE = (32, 28, 28, 128)
GRAPH, XLA = "Training step, graph mode", "The same under XLA"
ABOUT_MODELS = """\
First step: from `fit` to its end, in a fresh process, with a dataset whose batch size
is not known while tracing. Step: median over rounds of fits, in turn in one process.
Share of the cost left: (ours - without) / (Keras - without), where "without" is the
model without normalization; its median over the rounds, and its lowest and highest."""
ABOUT_FROZEN = """\
All statistics frozen by `keras_bn.freeze`, everything trainable; fused: by
`keras_bn.freeze(model, fuse=True)`. Share of the cost left: (fused - without) /
(frozen - without). Memory: what a step takes beyond what the process had before it."""
ABOUT_LAYERS = """\
Milliseconds per layer in a chain, medians of interleaved rounds, traced with the batch
size unknown."""


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
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    axes = figure.subplots()
    names = [layer.name(row) for row in graph]
    for rows, shift, label, color in (
        (graph, -0.2, "graph mode", "#2f6690"),
        (jit, 0.2, "under XLA", "#b65c00"),
    ):
        places = [names.index(layer.name(row)) + shift for row in rows]
        ratios = [row["ratio"] for row in rows]
        axes.barh(places, ratios, height=0.36, label=label, color=color, alpha=0.85)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.legend(frameon=False)
    axes.set_title("Keras's time / keras_bn's, a training step of a layer", loc="left")
    axes.set_xlabel("slower  ←  1  →  faster than Keras's layer")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)


def chains(full, seconds):
    """Rows of `layer.measure` by title; all in `--full`, else what is most run."""
    steps = layer.main(["--seconds", str(seconds)])
    compiled = [
        layer.measure(shape, axis, "xla", seconds)
        for shape, axis in layer.SHAPES
        if full or shape in COMPILED
    ]
    eager = [
        layer.measure(LARGE, -1, "eager", seconds, backward=backward)
        for backward in (True, False)
    ]
    inference = [
        layer.measure(shape, axis, seconds=seconds / 2, training=False)
        for shape, axis in layer.SHAPES
    ]
    parts = {GRAPH: steps, XLA: compiled}
    parts |= {"The same, eager; then forward alone": eager}
    parts |= {"Inference, graph mode": inference}
    for policy in ("mixed_bfloat16", "mixed_float16") if full else ():
        parts[f"Training step, {policy}"] = [
            layer.measure(shape, axis, seconds=seconds / 2, dtype=policy)
            for shape, axis in layer.SHAPES
        ]
    return parts


def report(results):
    """All results as a page; what users run comes first."""
    text = ["# Results", "", results["machine"] + ".", ""]
    text += ["## Whole models, `fit`", "", models.table(results["models"]), ""]
    text += [ABOUT_MODELS, ""]
    text += ["## Fine-tuning with frozen statistics, `fit`", ""]
    text += [frozen.table(results["frozen"]), "", ABOUT_FROZEN, ""]
    if results["first steps"]:
        text += ["## Other first steps", "", first.table(results["first steps"]), ""]
    for title, rows in results["layers"].items():
        about = [ABOUT_LAYERS, ""] if title == GRAPH else []
        text += [f"## {title}", "", *about, layer.table(rows), ""]
    shared = sync.table(results["synchronization"])
    text += ["## Two replicas, apart and synchronized", "", shared, ""]
    text += ["## Peak memory of a training step", ""]
    for how, result in results["memory"].items():
        text += [f"- {how}: {memory.words(result)}."]
    return "\n".join(text) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full",
        action="store_true",
        help="all models, the first evaluate and predict, every shape under XLA, half "
        "precision: about 35 minutes",
    )
    full = parser.parse_args(argv).full
    where = machine()
    print(where)
    seconds, rounds, fits = (3.0, 3, 5) if full else (0.7, 1, 3)
    whole = [
        models.measure(*model, rounds, fits)
        for model in (applications.FULL if full else applications.QUICK)
    ]
    print(models.table(whole), flush=True)
    results = {
        "machine": where,
        "models": whole,
        "frozen": [
            frozen.measure(*model, rounds, fits) for model in applications.QUICK
        ],
        "first steps": models.other_first_steps(rounds) if full else [],
        "layers": chains(full, seconds),
        "synchronization": sync.in_a_process(seconds),
        "memory": {"graph mode": memory.measure(), "XLA": memory.measure(jit=True)},
    }
    (HERE / "RESULTS.md").write_text(report(results))
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    layers = results["layers"]
    plot(layers[GRAPH], layers[XLA], HERE / "ratios.png")


if __name__ == "__main__":
    main()
