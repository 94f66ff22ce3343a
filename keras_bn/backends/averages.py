"""Averages of old and new values, and of the updates of replicas."""

from collections.abc import Callable, Sequence

import keras
from keras import ops

from keras_bn.moments import Tensor


def blend(old: Tensor, new: Tensor, usable: Tensor, momentum: float) -> Tensor:
    """Old and new values averaged; see the contract of the backends."""
    return ops.where(usable, old * momentum + new * (1.0 - momentum), old)


def common(
    counts: Tensor, nears: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What several replicas have added up, each about a value of its own, about one.

    Args:
        counts: how many elements of a channel each replica has.
        nears: the value of each.
        totals: the sum of the differences from it.

    All have the replicas along the leading axis, and are alike in shape and dtype.

    Returns:
        `(count, near, total)`: of all replicas together, about the value of one of
        them.
    """
    lowest = ops.full_like(nears, float("-inf"))
    near = ops.max(ops.where(counts > 0, nears, lowest), axis=0)
    near = ops.where(ops.isfinite(near), near, ops.zeros_like(near))
    totals = totals + counts * (nears - near)
    return ops.sum(counts, axis=0), near, ops.sum(totals, axis=0)


def average_updates(
    old: Sequence[Tensor | None],
    new: Sequence[Tensor | None],
    updated: Sequence[Tensor],
    total: Callable[..., list[Tensor]],
) -> list[Tensor | None]:
    """Average the replicas' updates, so that all end with the same state.

    A replica that did not update (a bad batch, or an empty share) is left out of the
    mean. Where no replica updated, the old value stays, to the bit.

    Args:
        old: tensors that are equal on every replica, a float first; None for no tensor.
        new: their values after this replica's update.
        updated: bools of the same shapes, true where this replica updated.
        total: sums each of several tensors over all replicas.

    Returns:
        List of tensors like `old`, equal on every replica.
    """
    indices = [i for i, value in enumerate(old) if value is not None]
    values: list[Tensor] = [old[i] for i in indices]
    dtype = values[0].dtype
    changes = [
        ops.cast(new[i] - value, dtype)
        for i, value in zip(indices, values, strict=True)
    ]
    sums = total(*changes, *(ops.cast(updated[i], dtype) for i in indices))
    averages: list[Tensor | None] = [None] * len(old)
    for i, value, change, count in zip(
        indices, values, sums[: len(changes)], sums[len(changes) :], strict=True
    ):
        change = change / ops.where(count > 1, count, ops.ones_like(count))
        if "int" in keras.backend.standardize_dtype(value.dtype):
            change = ops.round(change)
        averages[i] = value + ops.cast(change, value.dtype)
    return averages
