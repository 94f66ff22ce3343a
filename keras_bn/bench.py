"""Timing the layer beside Keras's on the machine at hand, in turn and in one process.

    keras-bn bench --shape 32,56,56,64

Absolute times say little on a shared machine; the ratio of two medians, taken round by
round in turn, says who is faster and by how much.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_bn import kernels
from keras_bn.kernels import modes, plan
from keras_bn.layer import BatchNormalization

SHAPES = ((32, 64), (128, 256), (256, 1024), (32, 28, 28, 128), (16, 56, 56, 64))
OURS, PEER = "keras_bn", "Keras"
# From this ratio on either side, a difference is one.
MARGIN = 1.05


class Timing(NamedTuple):
    """Milliseconds of one thing over many rounds: median and quartiles."""

    median: float
    low: float
    high: float
    rounds: int


def interleave(
    functions: dict[str, Callable[[], Any]], seconds: float, rounds: int = 7
) -> dict[str, Timing]:
    """Time functions in turn, so that whatever disturbs one disturbs the others.

    Args:
        functions: by name, each of no arguments, already warm or not.
        seconds: how long to go on, for all together.
        rounds: how many rounds at least.

    Returns:
        A `Timing` for each name.

    >>> sorted(interleave({"a": lambda: None, "b": lambda: None}, 0.01))
    ['a', 'b']
    """
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        function()
        function()
        repeats[name] = max(1, int(0.02 / max(_time(function, 1), 1e-6)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[name]) < rounds:
        for name, function in functions.items():
            times[name].append(1e3 * _time(function, repeats[name]))
    return {name: _timing(rounds) for name, rounds in times.items()}


def _timing(times):
    median, low, high = (float(np.quantile(times, q)) for q in (0.5, 0.25, 0.75))
    return Timing(median, low, high, rounds=len(times))


def _time(function, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def depth(shape) -> int:
    """How many layers a chain has: fewer of large ones.

    >>> depth((32, 64)), depth((16, 112, 112, 64))
    (16, 4)
    """
    return 16 if math.prod(shape) < 4e6 else 4


def chain(
    make: Callable[[], keras.Layer],
    shape: tuple[int, ...],
    mode: str = "tf.function",
    training: bool = True,
    dtype: str = "float32",
    backward: bool = True,
    known: bool = False,
) -> Callable[[], Any]:
    """Layers one after another as one function of no arguments, on random data.

    Args:
        make: gives a new layer.
        shape: of the input.
        mode: one of `kernels.modes.MODES`.
        training: whether to take training steps, forward and backward with the
            update of the moving statistics; or inference steps, forward alone.
        dtype: of the input.
        backward: whether training steps go backward.
        known: whether the batch size is known while tracing; in `fit` it is not.

    Returns:
        The function, for `depth(shape)` layers.
    """
    rng = np.random.default_rng(0)
    x, upstream = (
        keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32"), dtype)
        for _ in range(2)
    )
    spec = (shape if known else (None, *shape[1:]), dtype)
    forward, weights = in_line(make, spec[0], training, depth(shape))
    if not (training and backward):
        run = modes.in_mode(forward, mode, [spec])
        return lambda: run(x)
    step = modes.with_gradients(forward, weights, mode, [spec, spec])
    return lambda: step(x, upstream)


def in_line(make, shape, training=True, length=None):
    """New layers one after another.

    Args:
        make, shape, training: as for `chain`.
        length: how many; `depth(shape)` by default.

    Returns:
        `(forward, weights)`: a function of one tensor that returns one, and the
        trainable variables.
    """
    layers = [make() for _ in range(length or depth(shape))]
    for layer in layers:
        layer.build(shape)

    def forward(x):
        for layer in layers:
            x = layer(x, training=training)
        return x

    return forward, [w for layer in layers for w in layer.trainable_variables]


def compare(shape, mode="tf.function", training=True, seconds=5.0, **options):
    """Milliseconds per layer, ours and Keras's.

    Args:
        shape, mode, training: as for `chain`.
        seconds: how long to measure.
        **options: arguments of both layers, such as `axis` and `dtype`.

    Returns:
        A dict from name to `Timing`.
    """
    makes = {
        PEER: lambda: keras.layers.BatchNormalization(**options),
        OURS: lambda: BatchNormalization(**options),
    }
    functions = {n: chain(make, shape, mode, training) for n, make in makes.items()}
    return per_layer(interleave(functions, seconds), shape)


def per_layer(timings: dict[str, Timing], shape) -> dict[str, Timing]:
    """The timings of a chain as those of one of its layers."""
    n = depth(shape)
    return {
        name: Timing(t.median / n, t.low / n, t.high / n, t.rounds)
        for name, t in timings.items()
    }


def verdict(ratio: float) -> str:
    """What a ratio of medians says, Keras's time over ours.

    >>> verdict(2.0), verdict(1.0), verdict(0.5)
    ('2.0 times as fast', 'as fast', 'SLOWER: 0.50 times as fast')
    """
    if ratio >= MARGIN:
        return f"{ratio:.1f} times as fast"
    return "as fast" if ratio > 1 / MARGIN else f"SLOWER: {ratio:.2f} times as fast"


def crossover(seconds: float = 20.0, channels: int = 64) -> tuple[list, int | None]:
    """Where the fused kernel becomes the faster one on this machine.

    Args:
        seconds: how long to measure in all.
        channels: channels of the inputs.

    Returns:
        A list of `(elements, ms of the plain kernel, ms of the fused one)` per layer,
        and the number of elements from which the fused one stays faster; None if it
        never is.
    """
    rows = []
    for power in range(14, 22):
        shape = (2**power // channels, channels)
        plans = {name: plan.Plan(name, axes=(1,)) for name in ("plain", "fused")}
        functions = {name: _by_plan(each, shape) for name, each in plans.items()}
        timings = per_layer(interleave(functions, seconds / 8), shape)
        rows.append((2**power, timings["plain"].median, timings["fused"].median))
    start = None
    for elements, plain, fused in reversed(rows):
        if fused >= plain:
            break
        start = elements
    return rows, start


def _by_plan(how, shape):
    """A training step of a chain of kernels by one plan, as a function."""
    rng = np.random.default_rng(0)
    x, upstream = (
        keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))
        for _ in range(2)
    )
    gamma, beta = (keras.Variable(np.full(shape[-1:], v, "float32")) for v in (1, 0))

    def forward(x):
        for _ in range(depth(shape)):
            x, _ = kernels.forward(
                x, None, gamma.value, beta.value, epsilon=1e-3, plan=how
            )
        return x

    step = modes.with_gradients(forward, [gamma, beta], "tf.function")
    return lambda: step(x, upstream)


def add_bench(commands) -> None:
    """Add the `bench` command to the subparsers of a command line."""
    parser = commands.add_parser(
        "bench",
        help="time the layer beside Keras's on this machine",
        description="Time training steps of a chain of layers, keras_bn's and Keras's "
        "in turn, and print milliseconds per layer and the ratio of the medians.",
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="N,...,C",
        help="of an input, such as 32,56,56,64; may be given again",
    )
    parser.add_argument("--axis", type=int, default=-1, help="of the channels (-1)")
    parser.add_argument(
        "--mode", choices=modes.MODES, default="tf.function", help="how to run it"
    )
    parser.add_argument(
        "--inference", action="store_true", help="inference instead of training"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long to measure in all (60)"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="print from which size on a plan with the fused kernel is faster here",
    )

    def run(arguments):
        from rich.console import Console
        from rich.table import Table

        console = Console(highlight=False)
        if arguments.calibrate:
            rows, start = crossover(arguments.seconds)
            table = Table("elements", "plain, ms", "fused, ms")
            for elements, *times in rows:
                table.add_row(f"{elements:,}", *(f"{t:.3f}" for t in times))
            console.print(table)
            here = "none here" if start is None else f"{start:,} elements here"
            console.print(
                f"fused: faster from {here}; built in: {plan.FUSED_FROM:,}",
                style="bold",
            )
            return 0
        shapes = arguments.shape or SHAPES
        table = Table("input", "Keras, ms", "keras_bn, ms", "ratio", "keras_bn is")
        for shape in shapes:
            timings = compare(
                shape,
                arguments.mode,
                not arguments.inference,
                arguments.seconds / len(shapes),
                axis=arguments.axis,
            )
            ratio = timings[PEER].median / timings[OURS].median
            cells = (f"{timings[name].median:.3f}" for name in (PEER, OURS))
            table.add_row(str(shape), *cells, f"{ratio:.2f}", verdict(ratio))
        console.print(table)
        return 0

    parser.set_defaults(run=run, parser=parser)


def _shape(text):
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"must be two or more positive ints, such as 32,56,56,64, not {text!r}"
        )
    return shape
