"""`keras-bn bench`: time the layer beside Keras's on this machine.

keras-bn bench --shape 32,56,56,64
"""

import keras
from rich.console import Console

from keras_bn.backends import modes
from keras_bn.cli.errors import UsageError, refused
from keras_bn.pages import plain
from keras_bn.verify import chains, timing

_HEADER = ["input", "Keras, ms", "keras_bn, ms", "ratio", "keras_bn is"]
_SHAPES = ((32, 64), (128, 256), (256, 1024), (32, 28, 28, 128), (16, 56, 56, 64))


def run(arguments):
    grid = plain.table(_HEADER, _timed(arguments))
    console = Console(highlight=False)
    for line in plain.lines(grid, console):
        console.out(line)
    return 0


def _timed(arguments):
    """The rows of the table."""
    shapes = arguments.shape or _SHAPES
    mode = arguments.mode or modes.USUAL
    if mode not in modes.MODES:
        raise UsageError(
            f"--mode {mode}: Keras's backend {keras.backend.backend()} runs "
            f"{', '.join(modes.MODES)}"
        )
    rows = []
    for shape in shapes:
        if not -len(shape) <= arguments.axis < len(shape):
            raise UsageError(f"--axis {arguments.axis} is no axis of {shape}")
        with refused(ValueError, MemoryError, saying=f"{shape} can't be timed: "):
            timings = chains.time_both(
                shape,
                mode,
                not arguments.inference,
                arguments.seconds / len(shapes),
                axis=arguments.axis,
            )
        ours, peer = (timings[name].median for name in (chains.OURS, chains.PEER))
        row = (
            str(shape),
            f"{peer:.3f}",
            f"{ours:.3f}",
            f"{peer / ours:.2f}",
            timing.verdict(peer / ours),
        )
        rows.append(row)
    return rows
