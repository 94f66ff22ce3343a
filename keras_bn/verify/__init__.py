"""Timing, shared by `keras-bn bench` and the scripts in benchmarks/."""

from keras_bn.verify.chains import (
    OURS,
    PEER,
    chain,
    compare,
    depth,
    in_line,
    per_layer,
)
from keras_bn.verify.timing import Timing, interleave, verdict

__all__ = [
    "OURS",
    "PEER",
    "Timing",
    "chain",
    "compare",
    "depth",
    "in_line",
    "interleave",
    "per_layer",
    "verdict",
]
