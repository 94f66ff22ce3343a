"""Peak memory of a training step over a deep chain, each in a process of its own."""

import argparse
from pathlib import Path

from benchmarks import process

SHAPE, LAYERS = (16, 112, 112, 64), 8
KINDS = ("Keras", "keras_bn")


def resident(peak=False):
    """Bytes of this process in memory: now, or at most since `forget_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def step(kind, jit=False):
    """Take two training steps; how far memory grew at its peak (Linux alone)."""
    import keras
    import tensorflow as tf

    import keras_bn
    from keras_bn import verify
    from keras_bn.backends import modes

    cls = (keras.layers if kind == "Keras" else keras_bn).BatchNormalization
    unknown = (None, *SHAPE[1:])
    forward, variables = verify.in_line(cls, unknown, length=LAYERS)
    x, upstream = tf.random.normal(SHAPE), tf.random.normal(SHAPE)
    weights = [variable.value for variable in variables if variable.trainable]

    def train(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x)
        return tape.gradient(y, [x, *weights], output_gradients=upstream)[1:]

    mode = "xla" if jit else "graph"
    train = modes.in_mode(train, variables, mode, [(unknown, "float32")])
    forget_peak()
    before = resident()
    for _ in range(2):
        train(x)
    return resident(peak=True) - before


def measure(jit=False, number=process.number):
    """Bytes by kind, under XLA or not, and the ratio of ours to Keras's."""
    how = ["--jit"] if jit else []
    grown = {k: number("benchmarks.memory", "--kind", k, *how) for k in KINDS}
    return {**grown, "ratio": grown["keras_bn"] / grown["Keras"]}


def words(result):
    """A result of `measure` as a sentence."""
    mib = {kind: f"{result[kind] / 2**20:.0f} MiB" for kind in KINDS}
    return (
        f"{mib['keras_bn']}, {result['ratio']:.2f} of Keras's {mib['Keras']}, "
        f"for {LAYERS} layers of {SHAPE}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, help="measure it here, in bytes")
    parser.add_argument("--jit", action="store_true", help="under XLA")
    arguments = parser.parse_args(argv)
    if arguments.kind:
        print(step(arguments.kind, arguments.jit))
    else:
        print(words(measure(arguments.jit)))


if __name__ == "__main__":
    main()
