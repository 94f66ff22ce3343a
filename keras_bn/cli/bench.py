"""`keras-bn bench`: time the layer beside Keras's on this machine.

keras-bn bench --shape 32,56,56,64
"""

import argparse

from rich.console import Console
from rich.table import Table

from keras_bn.backends import modes
from keras_bn.cli.errors import UsageError, refused
from keras_bn.cli.options import at_least
from keras_bn.verify import chains, timing

_SHAPES = ((32, 64), (128, 256), (256, 1024), (32, 28, 28, 128), (16, 56, 56, 64))


def add(commands):
    """Add the command."""
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
        help="input shape, such as 32,56,56,64; may be repeated",
    )
    parser.add_argument("--axis", type=int, default=-1, help="channel axis (-1)")
    parser.add_argument(
        "--mode",
        choices=modes.MODES,
        default=modes.USUAL,
        help=f"how to run it ({modes.USUAL})",
    )
    parser.add_argument(
        "--inference", action="store_true", help="inference instead of training"
    )
    parser.add_argument(
        "--seconds",
        type=at_least(0, float),
        default=60.0,
        help="total time to measure (60)",
    )
    parser.set_defaults(run=_run, parser=parser)


def _run(arguments):
    Console(highlight=False).print(_timed(arguments))
    return 0


def _timed(arguments):
    """A table."""
    shapes = arguments.shape or _SHAPES
    table = Table("input", "Keras, ms", "keras_bn, ms", "ratio", "keras_bn is")
    for shape in shapes:
        if not -len(shape) <= arguments.axis < len(shape):
            raise UsageError(f"--axis {arguments.axis} is no axis of {shape}")
        with refused(ValueError, MemoryError, saying=f"{shape} can't be timed: "):
            timings = chains.compare(
                shape,
                arguments.mode,
                not arguments.inference,
                arguments.seconds / len(shapes),
                axis=arguments.axis,
            )
        ours, peer = (timings[name].median for name in (chains.OURS, chains.PEER))
        table.add_row(
            str(shape),
            f"{peer:.3f}",
            f"{ours:.3f}",
            f"{peer / ours:.2f}",
            timing.verdict(peer / ours),
        )
    return table


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
