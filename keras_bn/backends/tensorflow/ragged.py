"""Ragged tensors: inputs of several lengths, without padding."""

from collections.abc import Callable

import tensorflow as tf

from keras_bn.moments import Tensor


def dense(
    x: Tensor, mask: Tensor | None, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """An input and its mask without rows; see the contract of the backends."""
    if not isinstance(x, tf.RaggedTensor):
        return x, mask, lambda y: y
    ragged = x.ragged_rank
    if min(axes) <= ragged:
        raise ValueError(
            "The channel axes of a ragged tensor must come after its ragged axes. "
            f"Received: channels on axis {list(axes)}, inputs with {ragged} ragged axes"
        )
    if mask is not None and not isinstance(mask, tf.RaggedTensor):
        raise ValueError(
            "The mask of a ragged tensor must be a ragged tensor with the same rows, "
            f"without the channels. Received: a mask of shape {tuple(mask.shape)}"
        )
    # Axes of size 1 in the place of the ragged ones: the others keep their numbers.
    before = list(range(ragged))

    def rows(values):
        for axis in before:
            values = tf.expand_dims(values, axis)
        return values

    def restored(y):
        return x.with_flat_values(tf.squeeze(y, before))

    mask = None if mask is None else rows(mask.flat_values)
    return rows(x.flat_values), mask, restored
