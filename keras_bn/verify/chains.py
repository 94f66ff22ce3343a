"""Chains of layers, ours and Keras's, as functions to time."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_bn.backends import modes
from keras_bn.layer import BatchNormalization
from keras_bn.verify.timing import Timing, interleave

OURS, PEER = "keras_bn", "Keras"


def depth(shape) -> int:
    """The number of layers in a chain: fewer if they are large.

    >>> depth((32, 64)), depth((16, 112, 112, 64))
    (16, 4)
    """
    return 16 if math.prod(shape) < 4e6 else 4


def chain(
    make: Callable[[], keras.Layer],
    shape: tuple[int, ...],
    mode: str = modes.USUAL,
    training: bool = True,
    dtype: str = "float32",
    backward: bool = True,
    known: bool = False,
) -> Callable[[], Any]:
    """Layers one after another as one function of no arguments, on random data.

    Args:
        make: gives a new layer.
        shape: of the input.
        mode: one of `backends.modes.MODES`.
        training: whether to run training steps, forward and backward with the update
            of the moving statistics; or inference steps, forward only.
        dtype: of the input.
        backward: whether training steps include the backward pass.
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
    forward, variables = in_line(make, spec[0], training, depth(shape))
    if not (training and backward):
        run = modes.in_mode(forward, variables, mode, [spec])
        return lambda: modes.wait(run(x))
    step = modes.with_gradients(forward, variables, mode, [spec, spec])
    return lambda: modes.wait(step(x, upstream))


def in_line(make, shape, training=True, length=None):
    """New layers one after another.

    Args:
        make, shape, training: as for `chain`.
        length: how many; `depth(shape)` by default.

    Returns:
        `(forward, variables)`: a function of one tensor that returns one, and the
        variables of the layers.
    """
    layers = [make() for _ in range(length or depth(shape))]
    for layer in layers:
        layer.build(shape)

    def forward(x):
        for layer in layers:
            x = layer(x, training=training)
        return x

    return forward, [w for layer in layers for w in layer.variables]


def time_both(shape, mode=modes.USUAL, training=True, seconds=5.0, **options):
    """Milliseconds per layer, ours and Keras's.

    Args:
        shape, mode, training: as for `chain`.
        seconds: time to measure.
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
    """The timings of a chain, divided by its number of layers."""
    n = depth(shape)
    return {
        name: Timing(t.median / n, t.low / n, t.high / n, t.rounds)
        for name, t in timings.items()
    }
