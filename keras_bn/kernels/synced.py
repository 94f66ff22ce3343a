"""What the replicas of a distribution strategy tell each other.

Everything here is one reduction of one packed tensor, whose result has the same bits
on every replica. Called outside of replicas, `active` is False and nothing else of
this file may run.
"""

import math

import tensorflow as tf

from keras_bn.moments import Moments


def active() -> bool:
    """Whether this code runs as one of several replicas in step."""
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


def choose(condition, first, second):
    """`first()` where the condition holds, else `second()`.

    Among replicas both run and one is taken: a reduction inside a conditional would
    leave the others waiting.

    Args:
        condition: bool scalar, equal on every replica.
        first, second: functions that return lists of tensors, alike in shape and
            dtype.

    Returns:
        A list of tensors.
    """
    if not active():
        return tf.cond(condition, first, second)
    pairs = zip(first(), second(), strict=True)
    return [tf.where(condition, one, other) for one, other in pairs]


def merge(local: Moments, rest):
    """The moments of all replicas together.

    The parts are merged as Chan, Golub and LeVeque do (`Moments.merge`), in the order
    of the replicas and about the mean of the first that has elements: large means
    stay exact.

    Args:
        local: this replica's `Moments`.
        rest: what its mean lost to rounding, of the shape of `local.mean`.

    Returns:
        The merged `Moments`, equal on every replica, and what their mean lost.
    """
    parts = _gather(local.count, local.mean, rest, local.variance)
    shift = tf.zeros_like(rest)
    for count, mean, _, _ in reversed(parts):
        shift = tf.where(count > 0, mean, shift)
    merged, *others = (
        Moments(count, (mean - shift) + rest, variance)
        for count, mean, rest, variance in parts
    )
    for other in others:
        merged = merged.merge(other)
    return merged._replace(mean=shift), merged.mean


def agree(old, new, taken):
    """The mean of the steps that replicas took apart from each other.

    Where a replica had nothing to take in (a bad batch, or an empty share), it has no
    part in the mean; where none had, the old value stays, to the bit.

    Args:
        old: list of tensors that are equal on every replica, floats first.
        new: what they became on this replica.
        taken: list of bools of the same shapes, which of them took a step.

    Returns:
        List of tensors, equal on every replica, of the dtypes of `old`.
    """
    dtype = old[0].dtype
    steps = [tf.cast(n - o, dtype) for o, n in zip(old, new, strict=True)]
    sums = total(*steps, *(tf.cast(t, dtype) for t in taken))
    agreed = []
    for value, step, count in zip(old, sums[: len(old)], sums[len(old) :], strict=True):
        step /= tf.maximum(count, 1)
        if value.dtype.is_integer:
            step = tf.round(step)
        agreed.append(value + tf.cast(step, value.dtype))
    return agreed


def total(*values):
    """Tensors of any static shapes, each added up over all replicas.

    Args:
        *values: tensors of one dtype, such as the two sums of the backward pass.

    Returns:
        List of tensors of the same shapes, equal on every replica.
    """
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
