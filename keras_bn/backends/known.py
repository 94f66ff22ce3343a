"""What is simple on a backend that knows all sizes, and adds as fast as any way."""

from collections.abc import Sequence

from keras_bn.backends.layout import broadcast
from keras_bn.moments import Tensor


def checked(mask: Tensor, x: Tensor, along: Sequence[int]) -> Tensor:
    """The mask: its sizes were compared before; see the contract of the backends."""
    return mask


def add_offset(x: Tensor, offset: Tensor, axis: int) -> Tensor:
    """`x + offset`, with one value per channel; see the contract of the backends."""
    return x + broadcast(offset, x.shape, (axis,))
