"""Statistics and gradient sums shared by the replicas of a distribution strategy."""

import tensorflow as tf

from keras_bn.moments import Moments


def active() -> bool:
    """Whether this code runs as one of several replicas in step."""
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


def merge(local: Moments) -> Moments:
    """The moments of all replicas together, from one gather of the packed parts.

    Merged as Chan, Golub and LeVeque do (`Moments.merge`), in the order of the
    replicas, so that every replica gets the same bits.

    Args:
        local: this replica's `Moments`, with `mean` of shape `(channels,)`.

    Returns:
        The merged `Moments`, equal on every replica.
    """
    count = tf.broadcast_to(local.count, tf.shape(local.mean))
    packed = tf.stack([count, local.mean, local.variance])[tf.newaxis]
    replica = tf.distribute.get_replica_context()
    gathered = replica.all_gather(packed, axis=0)
    merged = Moments(*tf.unstack(gathered[0]))
    for part in range(1, replica.num_replicas_in_sync):
        merged = merged.merge(Moments(*tf.unstack(gathered[part])))
    return merged


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
