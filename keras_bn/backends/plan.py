"""The choice of kernel and layout for a batch, made once, from what is known of it."""

import math
from typing import NamedTuple

# Elements from which the fused op is faster on a CPU: it takes 0.2 ms more to start
# and moves each element fewer times (2 cores, `python -m benchmarks.crossover`).
FUSED_FROM = 2**17

# Channels of a matrix from which it pays to choose the kernel at run time. With fewer,
# batches are usually small, and the 10 µs of the choice are a tenth or more of a step.
EITHER_FROM = 256

# Elements up to which XLA is told to compute outputs once, by
# `formulas.prevent_refusion`: above, the memory it costs outweighs the time it saves.
ONCE_UP_TO = 2**22

# Assumed sizes of unknown axes: of the batch, and of any other.
ASSUMED_BATCH, ASSUMED_SIZE = 32, 16

# cuDNN accepts no smaller epsilon.
CUDNN_EPSILON = 1.001e-5


class Plan(NamedTuple):
    """How a batch is to be normalized.

    Args:
        kernel: `"plain"`: the formulas; `"fused"`: the op of TensorFlow or PyTorch;
            `"either"`: these two, chosen at run time by the size of the batch;
            `"closed"`: the formulas with a gradient of their own, on JAX.
        axes: the channel axes, non-negative and ascending.
        group_size: size of the groups that the batch is cut into, or None.
        synchronized: whether the statistics are those of all replicas together.
        xla: whether XLA compiles what is computed.
        once: whether XLA is to compute outputs once.
        gpu: whether the graph runs on a GPU.
    """

    kernel: str
    axes: tuple[int, ...]
    group_size: int | None = None
    synchronized: bool = False
    xla: bool = False
    once: bool = False
    gpu: bool = False


def fused_fits(dtype: str, axes, epsilon: float, gpu: bool) -> bool:
    """Whether the fused op can serve an input at all.

    >>> fused_fits("float32", (3,), 1e-3, gpu=False)
    True
    >>> fused_fits("float64", (3,), 1e-3, gpu=False)
    False
    """
    too_small = gpu and epsilon < CUDNN_EPSILON
    return len(axes) == 1 and dtype != "float64" and not too_small


def by_size(shape, channels: int) -> str:
    """The kernel that is fastest on a CPU for an input that any kernel may serve.

    For images, usually only the batch is unknown, and the other sizes tell small from
    large. A sequence of unknown length, or a matrix of many channels, may be either:
    its kernel is chosen at run time, which takes 10 µs.

    Args:
        shape: of the input, None where a size is unknown.
        channels: how many channels it has.

    >>> by_size((None, 56, 56, 64), 64), by_size((None, 7, 7, 64), 64)
    ('fused', 'plain')
    >>> by_size((None, 512), 512), by_size((None, 64), 64), by_size((4096, 64), 64)
    ('either', 'plain', 'fused')
    """
    unknown = sum(size is None for size in shape)
    if unknown and len(shape) == 2:
        return "either" if channels >= EITHER_FROM else "plain"
    if unknown == 2 and len(shape) == 3:
        return "either"
    return "fused" if elements(shape) >= FUSED_FROM else "plain"


def elements(shape) -> int:
    """How many elements an input has, guessing what is unknown.

    >>> elements((None, 4, 16))
    2048
    """
    guesses = [ASSUMED_BATCH] + [ASSUMED_SIZE] * (len(shape) - 1)
    return math.prod(
        guess if size is None else size
        for size, guess in zip(shape, guesses, strict=True)
    )
