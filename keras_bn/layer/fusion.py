"""How a frozen normalization and the linear layer before it are computed as one.

A frozen batch normalization is a scale and an offset per channel. They can go into the
kernel and the bias of the linear layer before it, which is cheaper. So that layer
attaches a deferred affine to its output: how to compute the output again, scaled and
shifted, from its own input. The normalization applies it. Nothing then uses the output
that it was attached to, and what is compiled does not compute that.

Each layer still gives its own output to whoever asks for that.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

from keras_bn.moments import Tensor


class DeferredAffine(NamedTuple):
    """How a tensor can be computed again with a scale and an offset.

    Args:
        axes: the channel axes of the tensor, not negative and ascending.
        compute: `compute(scale, offset)` gives `tensor * scale + offset`, with one
            value per channel each.
    """

    axes: tuple[int, ...]
    compute: Callable[[Tensor, Tensor], Tensor]


_NAME = "_keras_bn_deferred_affine"
# Of tensors that take no attributes, as JAX's: by their identity, while they live.
_deferred: dict[int, DeferredAffine] = {}


def attach(tensor: Tensor, deferred: DeferredAffine) -> None:
    """Attach a deferred affine to a tensor."""
    try:
        setattr(tensor, _NAME, deferred)
    except AttributeError:
        _deferred[id(tensor)] = deferred
        weakref.finalize(tensor, _deferred.pop, id(tensor), None)


def find(tensor: Tensor, axes: tuple[int, ...]) -> DeferredAffine | None:
    """The deferred affine of a tensor; None without one for these channel axes."""
    deferred = getattr(tensor, _NAME, _deferred.get(id(tensor)))
    return deferred if deferred is not None and deferred.axes == axes else None


def apply(deferred: DeferredAffine, scale: Tensor, offset: Tensor) -> Tensor:
    """The tensor, scaled and shifted; it has a deferred affine of its own."""

    def compute(next_scale, next_offset):
        return deferred.compute(scale * next_scale, offset * next_scale + next_offset)

    y = deferred.compute(scale, offset)
    attach(y, DeferredAffine(deferred.axes, compute))
    return y
