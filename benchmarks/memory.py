"""Peak memory of a training step over a deep chain, each in a process of its own."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

SHAPE, LAYERS = (16, 112, 112, 64), 8
KINDS = ("Keras", "keras_bn")


def measure(kind):
    """Bytes of a step of this kind above what the process held before."""
    command = [sys.executable, "-m", "benchmarks.memory", "--kind", kind]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    )
    return int(result.stdout.split()[-1])


def resident(peak=False):
    """Bytes of this process in memory: now, or at most since `forget_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def step(kind):
    """Take two training steps; how far memory grew at its peak (Linux alone)."""
    import keras
    import tensorflow as tf

    import keras_bn
    from keras_bn import bench

    cls = (keras.layers if kind == "Keras" else keras_bn).BatchNormalization
    forward, variables = bench.in_line(cls, SHAPE, length=LAYERS)
    x, upstream = tf.random.normal(SHAPE), tf.random.normal(SHAPE)
    weights = [variable.value for variable in variables]

    @tf.function(autograph=False)
    def train(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x)
        return tape.gradient(y, [x, *weights], output_gradients=upstream)[1:]

    forget_peak()
    before = resident()
    for _ in range(2):
        train(x)
    return resident(peak=True) - before


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS)
    kind = parser.parse_args(argv).kind
    if kind:
        print(step(kind))
        return None
    bytes_ = {kind: measure(kind) for kind in KINDS}
    ratio = bytes_["keras_bn"] / bytes_["Keras"]
    for name, value in bytes_.items():
        print(f"{name}: {value / 2**20:.0f} MiB")
    print(f"ours / Keras's: {ratio:.2f}")
    return {**bytes_, "ratio": ratio}


if __name__ == "__main__":
    main()
