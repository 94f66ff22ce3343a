"""Which kernel serves an input, from what is known of it while tracing."""

import contextlib
import contextvars
import math
from typing import NamedTuple

import tensorflow as tf

# TensorFlow has no public name for "is this graph compiled by XLA".
from tensorflow.python.ops import control_flow_util

# Elements from which the fused op is faster on a CPU: it takes 0.15 ms more to start
# and about 1 ns less for each element (2 cores, `keras-bn bench --calibrate`).
FUSED_FROM = 2**17

# Elements, and elements of each channel, from which XLA on a CPU is faster with sums by
# strips: 4 to 36 percent of a step less from 131,072 on, in chains of eight shapes; but
# with 128 elements of a channel four times as long, and with 256 a fifth less.
STRIPS_FROM, STRIPS_ROWS = 2**17, 256

# What an axis of unknown size is taken for, by its place: a batch; anything else.
ASSUMED_BATCH, ASSUMED_SIZE = 32, 8

# cuDNN takes no smaller epsilon.
CUDNN_EPSILON = 1.001e-5


class Known(NamedTuple):
    """What is known of a batch when its kernel is chosen.

    Args:
        large: what `is_large` says of its shape.
        axes: the channel axes, non-negative and ascending.
        dtype: name of the input's dtype.
        epsilon: what is added to the variance.
        special: whether a mask, groups or other replicas share in the statistics.
        xla: whether XLA compiles the graph.
        gpu: whether the graph runs on a GPU.
    """

    large: bool
    axes: tuple
    dtype: str = "float32"
    epsilon: float = 1e-3
    special: bool = False
    xla: bool = False
    gpu: bool = False


def choose(known: Known) -> str:
    """The kernel for a batch: `"fused"` where it is right and pays, else `"plain"`.

    Args:
        known: all that the choice may depend on.

    Returns:
        `"plain"` or `"fused"`.

    >>> choose(Known(is_large((None, 56, 56, 64)), axes=(3,)))
    'fused'
    >>> choose(Known(is_large((None, 64)), axes=(1,)))
    'plain'
    """
    if known.special or known.xla or len(known.axes) > 1:
        return "plain"
    if known.dtype not in ("float16", "bfloat16", "float32"):
        return "plain"
    if known.gpu:
        fits = known.dtype != "bfloat16" and known.epsilon >= CUDNN_EPSILON
        return "fused" if fits else "plain"
    return "fused" if known.large else "plain"


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


def is_large(shape) -> bool:
    """Whether an input of this shape is large enough for the fused op to pay."""
    return elements(shape) >= FUSED_FROM


def by_strips(shape, channels: int) -> bool:
    """Whether sums by strips pay for an input of this shape under XLA.

    >>> by_strips((None, 56, 56, 64), 64), by_strips((128, 4096), 4096)
    (True, False)
    """
    assumed = _strips.get()
    if assumed is not None:
        return assumed
    size = elements(shape)
    return size >= STRIPS_FROM and size >= STRIPS_ROWS * channels


_large: contextvars.ContextVar = contextvars.ContextVar("large", default=None)
_strips: contextvars.ContextVar = contextvars.ContextVar("strips", default=None)


@contextlib.contextmanager
def assuming(large: bool | None = None, strips: bool | None = None):
    """Within, an input is known to be so, whatever the shapes in the trace say.

    An eager call knows its sizes, but is traced without them so that one trace serves
    them all.

    Args:
        large: what `Known.large` is to be; None for what the shapes say.
        strips: what `by_strips` is to say; None as well.
    """
    tokens = _large.set(large), _strips.set(strips)
    try:
        yield
    finally:
        _large.reset(tokens[0])
        _strips.reset(tokens[1])


def known(x, axes, epsilon, special) -> Known:
    """What is known here and now of the input `x`."""
    large = _large.get()
    return Known(
        large=is_large(x.shape) if large is None else large,
        axes=tuple(axes),
        dtype=x.dtype.name,
        epsilon=epsilon,
        special=special,
        xla=in_xla(),
        gpu=on_gpu(),
    )


def in_xla() -> bool:
    """Whether the graph being traced is compiled by XLA."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def on_gpu() -> bool:
    """Whether TensorFlow would put the ops of an eager call or a graph on a GPU."""
    if not tf.config.list_logical_devices("GPU"):
        return False
    return "CPU" not in tf.zeros([]).device.upper()
