"""How the replicas of a distribution strategy exchange moments and updates.

Every exchange is one reduction of one packed tensor, whose result has the same bits on
every replica. Outside of replicas, `active` is False, and nothing else in this file may
be called.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_bn.backends import averages
from keras_bn.moments import Moments, Tensor


def active() -> bool:
    """Whether this code runs as one of several replicas in step."""
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


def cond(condition: Tensor, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """`first()` where the condition holds, else `second()`.

    Among replicas, both run and one result is taken: a reduction inside a conditional
    would leave other replicas waiting.

    Args:
        condition: bool scalar, equal on every replica.
        first, second: functions that return tensors in the same structure, alike in
            shape and dtype; None may stand for a tensor in both.

    Returns:
        The structure, with the tensors of the one that was taken.
    """
    if not active():
        return tf.cond(condition, first, second)

    def select(one, other):
        return None if one is None else tf.where(condition, one, other)

    return tf.nest.map_structure(select, first(), second())


def merge(local: Moments, shift):
    """The moments of all replicas together.

    The parts are merged as Chan, Golub and LeVeque do (`Moments.merge`), in the order
    of the replicas and about the shift of the first that has elements: large means
    stay exact.

    Args:
        local: this replica's `Moments`, of its input less the shift.
        shift: what was subtracted from its input, of the shape of `local.mean`.

    Returns:
        `(moments, shift)`: those of all replicas, about the shift, which is equal on
        every replica too.
    """
    parts = _gather(local.count, shift, local.mean, local.variance)
    common = tf.zeros_like(shift)
    for count, own, _, _ in reversed(parts):
        common = tf.where(count > 0, own, common)
    merged, *others = (
        Moments(count, (own - common) + mean, variance)
        for count, own, mean, variance in parts
    )
    for other in others:
        merged = merged.merge(other)
    return merged, common


def average_updates(
    old: Sequence[Tensor | None],
    new: Sequence[Tensor | None],
    updated: Sequence[Tensor],
) -> list[Tensor | None]:
    """Average the replicas' updates; see `averages.average_updates`."""
    return averages.average_updates(old, new, updated, total)


def total(*values):
    """A list of tensors of one dtype and static shapes, each added up over replicas."""
    replica = tf.distribute.get_replica_context()
    packed = replica.all_reduce(tf.distribute.ReduceOp.SUM, _pack(values))
    return _unpack(packed, values)


def _gather(*values):
    """The values of every replica: a list of tuples, in the order of the replicas.

    Each replica adds its part to a row of its own, so that the sum is a gather whose
    shape is known.
    """
    replica = tf.distribute.get_replica_context()
    replicas = replica.num_replicas_in_sync
    packed = _pack(values)
    own = tf.range(replicas)[:, None] == replica.replica_id_in_sync_group
    # Not a product with 0 and 1, which would spread a NaN to the other rows.
    rows = tf.where(own, packed, tf.zeros_like(packed))
    rows = replica.all_reduce(tf.distribute.ReduceOp.SUM, rows)
    return [_unpack(row, values) for row in tf.unstack(rows, replicas)]


def _pack(values):
    return tf.concat([tf.reshape(value, [-1]) for value in values], 0)


def _unpack(packed, like):
    parts = tf.split(packed, [math.prod(value.shape) for value in like])
    pairs = zip(parts, like, strict=True)
    return [tf.reshape(part, value.shape) for part, value in pairs]
