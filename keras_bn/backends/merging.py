"""Averages of old and new values, and of the steps of replicas: arithmetic alone."""

from collections.abc import Callable, Sequence

import keras
from keras import ops

from keras_bn.moments import Tensor


def blend(old: Tensor, new: Tensor, usable: Tensor, momentum: float) -> Tensor:
    """Old and new values averaged; see the contract of the backends."""
    return ops.where(usable, old * momentum + new * (1.0 - momentum), old)


def agree(
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    taken: Sequence[Tensor],
    total: Callable[..., list[Tensor]],
) -> list[Tensor]:
    """Average the replicas' steps, so that all end with the same state.

    A replica that did not update (a bad batch, or an empty share) is left out of the
    mean. Where no replica updated, the old value stays, to the bit.

    Args:
        old: tensors that are equal on every replica, a float first; None for no tensor.
        new: their values after this replica's step.
        taken: bools of the same shapes, true where this replica updated.
        total: sums each of several tensors over all replicas.

    Returns:
        List of tensors like `old`, equal on every replica.
    """
    dtype = old[0].dtype
    present = [i for i, value in enumerate(old) if value is not None]
    steps = [ops.cast(new[i] - old[i], dtype) for i in present]
    sums = total(*steps, *(ops.cast(taken[i], dtype) for i in present))
    agreed = [None] * len(old)
    pairs = zip(sums[: len(steps)], sums[len(steps) :], strict=True)
    for i, (step, count) in zip(present, pairs, strict=True):
        step = step / ops.where(count > 1, count, ops.ones_like(count))
        if "int" in keras.backend.standardize_dtype(old[i].dtype):
            step = ops.round(step)
        agreed[i] = old[i] + ops.cast(step, old[i].dtype)
    return agreed
