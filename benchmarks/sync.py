"""What synchronization costs: milliseconds per layer of a step on two replicas."""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from keras_bn import verify
from keras_bn.backends import modes

DEVICES = ["CPU:0", "CPU:1"]
# Of the share of one replica.
SHAPES = [(32, 64), (128, 256), (256, 1024), (32, 7, 7, 512), (16, 28, 28, 128)]
KINDS = {
    "Keras": keras.layers.BatchNormalization,
    "keras_bn": keras_bn.BatchNormalization,
}
HOW = ("apart", "together")


def chain(strategy, make, shape):
    """A training step of `bench.depth(shape)` layers on every replica of a strategy.

    Args:
        strategy: a `tf.distribute.Strategy`.
        make: gives a new layer.
        shape: of the input of one replica.

    Returns:
        A function of no arguments.
    """
    with strategy.scope():
        forward, variables = verify.in_line(make, shape)
    rng = np.random.default_rng(0)
    arguments = [
        strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(rng.normal(size=shape), "float32")
        )
        for _ in range(2)
    ]
    step = modes.with_gradients(forward, variables, "eager")
    # A partial, or TensorFlow takes every new chain for a retrace of one function.
    run = tf.function(functools.partial(strategy.run, step), autograph=False)
    return lambda: run(arguments)


def measure(strategy, shape, seconds=5.0):
    """One row: each layer on its own replica's batch, and on that of all."""
    chains = {}
    for name, cls in KINDS.items():
        for how in HOW:
            make = functools.partial(cls, synchronized=how == "together")
            chains[f"{name}, {how}"] = chain(strategy, make, shape)
    timings = verify.per_layer(verify.interleave(chains, seconds), shape)
    row = {"shape": shape, "ms": {name: t._asdict() for name, t in timings.items()}}
    for name in KINDS:
        apart, together = (timings[f"{name}, {how}"].median for how in HOW)
        row[f"{name}, cost"] = together - apart
    return row


def table(rows):
    """The rows as a table in Markdown."""
    columns = [f"{name}, {how}" for name in KINDS for how in (*HOW, "cost")]
    lines = [["input of a replica", *(f"{c}, ms" for c in columns)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        times = (
            row[column] if column in row else row["ms"][column]["median"]
            for column in columns
        )
        lines.append([str(tuple(row["shape"])), *(f"{t:.3f}" for t in times)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_a_process(seconds):
    """The rows, measured where two CPU devices can still be made."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.sync", "--seconds", str(seconds)]
        subprocess.run([*command, "--json", str(file)], check=True)
        return json.loads(file.read_text())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each shape")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * len(DEVICES),
    )
    strategy = tf.distribute.MirroredStrategy(DEVICES)
    rows = []
    for shape in SHAPES:
        rows.append(measure(strategy, shape, arguments.seconds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
