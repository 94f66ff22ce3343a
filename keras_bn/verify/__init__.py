"""Timing, shared by `keras-bn bench` and the scripts in benchmarks/."""

from keras_bn.verify.chains import (
    OURS,
    PEER,
    chain,
    depth,
    in_line,
    per_layer,
    time_both,
)
from keras_bn.verify.timing import Timing, interleave, verdict

__all__ = [
    "OURS",
    "PEER",
    "Timing",
    "chain",
    "depth",
    "in_line",
    "interleave",
    "per_layer",
    "time_both",
    "verdict",
]
