"""Statistics and gradient sums shared by the replicas of a distribution strategy."""

import tensorflow as tf

from keras_bn.moments import Moments


def active() -> bool:
    """Whether this code runs as one of several replicas in step."""
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


def merge(local: Moments, rest):
    """The moments of all replicas together, from one reduction of the packed parts.

    Each replica adds its part to a row of its own, so that the sum is a gather whose
    shape is known. The parts are merged as Chan, Golub and LeVeque do
    (`Moments.merge`), in the order of the replicas and about the mean of the first
    that has elements: every replica gets the same bits, and large means stay exact.

    Args:
        local: this replica's `Moments`.
        rest: what its mean lost to rounding, of the shape of `local.mean`.

    Returns:
        The merged `Moments`, equal on every replica, and what their mean lost.
    """
    replica = tf.distribute.get_replica_context()
    replicas = replica.num_replicas_in_sync
    count = tf.broadcast_to(local.count, local.mean.shape)
    packed = tf.stack([count, local.mean, rest, local.variance])
    own = tf.range(replicas) == replica.replica_id_in_sync_group
    own = tf.reshape(own, [replicas] + [1] * packed.shape.rank)
    # Not a product with 0 and 1, which would spread a NaN to the other rows.
    rows = tf.where(own, packed, tf.zeros_like(packed))
    rows = replica.all_reduce(tf.distribute.ReduceOp.SUM, rows)
    parts = [tf.unstack(row) for row in tf.unstack(rows, replicas)]

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


def total(*sums):
    """The given sums added up over all replicas, in one reduction.

    Args:
        *sums: tensors of one shape, such as the two sums of the backward pass.

    Returns:
        Tensors of the same shapes, equal on every replica.
    """
    replica = tf.distribute.get_replica_context()
    packed = replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack(sums))
    return tf.unstack(packed)
