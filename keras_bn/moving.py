"""How a moving statistic takes in the Moments of a batch."""

from keras import ops

from keras_bn.moments import Moments


def exponential(mean, variance, batch: Moments, momentum: float):
    r"""One exponential step of the moving statistics toward those of a batch.

    $$\mu \leftarrow m\,\mu + (1-m)\,\bar x, \qquad
      \sigma^2 \leftarrow m\,\sigma^2 + (1-m)\,s^2$$

    A channel whose batch moments are not finite, or rest on no element at all, keeps
    both old values to the bit: one bad batch must not cost a trained model.

    Args:
        mean: present moving mean, one value per channel.
        variance: present moving variance, of the same shape.
        batch: `Moments` of the batch, in any float dtype.
        momentum: weight of the old value, in [0, 1].

    Returns:
        The new `(mean, variance)`, in the dtype of the old ones.

    Source: Ioffe and Szegedy, 2015; Keras's `momentum`, which is 1 − PyTorch's.

    >>> import numpy as np
    >>> from keras_bn.moments import Moments
    >>> batch = Moments(8.0, np.array([1.0, np.nan]), np.array([4.0, 4.0]))
    >>> mean, variance = exponential(np.zeros(2), np.ones(2), batch, momentum=0.5)
    >>> print(mean.numpy(), variance.numpy())
    [0.5 0. ] [2.5 1. ]
    """
    finite = ops.logical_and(ops.isfinite(batch.mean), ops.isfinite(batch.variance))
    usable = ops.logical_and(finite, batch.count > 0)

    def step(old, new):
        new = ops.cast(new, old.dtype)
        return ops.where(usable, old * momentum + new * (1.0 - momentum), old)

    return step(mean, batch.mean), step(variance, batch.variance)
