"""How a frozen normalization and the linear layers before it are computed as one.

A frozen batch normalization is a scale and an offset per channel. They can go into the
kernel and the bias of the linear layer before it, which is cheaper. So that layer
attaches a deferred affine to its output: how to compute the output again, scaled and
shifted, from its own input. A layer between the two passes it on. The normalization
applies it. Nothing then uses the output that it was attached to, and what is compiled
does not compute that.

Each layer still gives its own output to whoever asks for that.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_bn.backends.plan import elements
from keras_bn.layer import step
from keras_bn.moments import Tensor

# Scaling a kernel costs as much per element as scaling an output: where the output has
# fewer than this many times the elements of the kernel, it is scaled itself.
WORTH = 4


def _unchanged(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return scale, offset


class DeferredAffine(NamedTuple):
    """How a tensor can be computed again with a scale and an offset.

    Args:
        axes: the channel axes of the tensor, not negative and ascending.
        size: how many elements of kernels have to be scaled for it.
        run: `run(*weights(scale, offset))` gives `tensor * scale + offset`, with one
            value per channel each.
        weights: of a linear layer, its kernel and bias then.
        layer: the linear layer, or the normalization of the source itself, if any.
        source: the tensor that it takes.
    """

    axes: tuple[int, ...]
    size: int
    run: Callable[..., Tensor]
    weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _unchanged
    layer: Any = None
    source: Tensor | None = None

    def compute(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The tensor with a scale and an offset."""
        return self.run(*self.weights(scale, offset))


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


def itself(
    source: Tensor, x: Tensor, axes: tuple[int, ...], layer: Any = None
) -> DeferredAffine:
    """The deferred affine of a tensor that is scaled and shifted itself.

    Args:
        source, layer: as of `DeferredAffine`.
        x: the source in the dtype to compute in.
        axes: its channel axes.
    """

    def run(scale, offset):
        y = step.affine(ops.cast(x, scale.dtype), scale, offset, axes)
        return ops.cast(y, x.dtype)

    return DeferredAffine(axes, 0, run, layer=layer, source=source)


def normalize(
    inputs: Tensor, own: DeferredAffine, scale: Tensor, offset: Tensor
) -> Tensor:
    """A tensor, scaled and shifted, by its deferred affine where that is cheaper.

    Args:
        inputs: the tensor.
        own: what `itself` gives for it.
        scale, offset: one value per channel each.

    Returns:
        The output, which has a deferred affine of its own.
    """
    deferred = find(inputs, own.axes) or own

    def weights(next_scale, next_offset):
        return deferred.weights(scale * next_scale, offset * next_scale + next_offset)

    worth = elements(inputs.shape) >= WORTH * deferred.size
    y = (deferred if worth else own).compute(scale, offset)
    attach(y, deferred._replace(weights=weights))
    return y
