"""The size from which TensorFlow's fused op is faster than the formulas on a CPU.

    python -m benchmarks.crossover                     20 seconds
    python -m benchmarks.crossover --seconds 60

`keras_bn.backends.plan.FUSED_FROM` holds what was found.
"""

import argparse

import keras
import numpy as np

from keras_bn.backends import backend, modes
from keras_bn.backends.plan import FUSED_FROM, Plan
from keras_bn.verify import depth, interleave, per_layer

CHANNELS = 64
# From 2**14 elements to 2**21.
POWERS = range(14, 22)


def measure(seconds):
    """Rows of `(elements, ms of the formulas, ms of the op)`, for a layer each."""
    rows = []
    for power in POWERS:
        shape = 2**power // CHANNELS, CHANNELS
        steps = {name: step(name, shape) for name in ("plain", "fused")}
        timings = per_layer(interleave(steps, seconds / len(POWERS)), shape)
        rows.append((2**power, timings["plain"].median, timings["fused"].median))
    return rows


def step(kernel, shape):
    """A training step of a chain of normalizations by one kernel."""
    rng = np.random.default_rng(0)
    x, upstream = (
        keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))
        for _ in range(2)
    )
    gamma, beta = (keras.Variable(np.full(shape[-1:], v, "float32")) for v in (1, 0))
    plan = Plan(kernel, axes=(1,))

    def forward(x):
        # As `compiled` does: variables are read once.
        affine = [keras.ops.convert_to_tensor(v) for v in (gamma, beta)]
        for _ in range(depth(shape)):
            x, _ = backend.forward(x, None, *affine, epsilon=1e-3, plan=plan)
        return x

    run = modes.with_gradients(forward, [gamma, beta], modes.USUAL)
    return lambda: modes.wait(run(x, upstream))


def crossover(rows):
    """The number of elements from which the op stays faster, or None."""
    start = None
    for elements, plain, fused in reversed(rows):
        if fused >= plain:
            break
        start = elements
    return start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="total time (20)")
    rows = measure(parser.parse_args().seconds)
    print("| elements | formulas, ms | op, ms |\n|---|---|---|")
    for elements, plain, fused in rows:
        print(f"| {elements:,} | {plain:.3f} | {fused:.3f} |")
    print(f"\nThe op is faster from: {crossover(rows)}; FUSED_FROM is {FUSED_FROM:,}")


if __name__ == "__main__":
    main()
