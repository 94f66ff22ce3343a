"""How fast the machine copies memory, and how close to it a kernel comes.

An exact training step reads x for the mean, again for the variance (about a mean that
is known only then), again to write y; then x and the upstream gradient for the sums,
and both again to write dx: 7 reads and 2 writes of the input's size.
"""

import math

import tensorflow as tf

from keras_bn import bench

PASSES = 9


def copy_rate(elements: int, seconds: float = 1.0) -> float:
    """Bytes per second of `a + b` into a tensor of its own, in graph mode."""
    a, b = tf.random.normal([elements]), tf.random.normal([elements])
    triad = tf.function(lambda a, b: tf.raw_ops.AddV2(x=a, y=b), autograph=False)
    timing = bench.interleave({"triad": lambda: triad(a, b)}, seconds)["triad"]
    return 3 * 4 * elements / (timing.median * 1e-3)


def step_rate(shape, milliseconds: float) -> float:
    """Bytes per second that a training step of a layer came to, at the fewest."""
    return PASSES * 4 * math.prod(shape) / (milliseconds * 1e-3)


if __name__ == "__main__":
    for power in range(16, 25, 2):
        print(f"{2**power:>12,} elements: {copy_rate(2**power) / 1e9:6.1f} GB/s")
