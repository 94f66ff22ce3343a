"""Moments: how many elements a statistic rests on, their mean, their variance."""

from typing import Any, NamedTuple

import keras
from keras import ops

# A tensor of the backend, a Keras variable, or an array.
Tensor = Any


def at_least_float32(dtype: Any) -> str:
    """The dtype in which a value of a float dtype is computed: at least float32.

    Keras's `result_type` gives float32 for float64 on PyTorch and JAX.

    >>> at_least_float32("bfloat16"), at_least_float32("float64")
    ('float32', 'float64')
    """
    double = keras.backend.standardize_dtype(dtype) == "float64"
    return "float64" if double else "float32"


class Moments(NamedTuple):
    r"""Count, mean and population variance of a set of elements, per channel.

    Every statistic in this package is passed around as `Moments`. A mask changes
    `count`; an empty batch has `count == 0`; parts of a batch (replicas, or batches of
    a data set) are merged, never averaged.

    Args:
        count: number of elements behind each statistic, a number,
            tensor or array that broadcasts against `mean`.
        mean: tensor or array, one value per channel.
        variance: the *population* (biased) variance, of the shape of `mean`.

    Where `count` is 0, `mean` and `variance` have no meaning and may hold anything.

    Example:

    >>> import numpy as np
    >>> from keras_bn import Moments
    >>> first = Moments(np.array(2.0), np.array([1.0]), np.array([1.0]))   # 0, 2
    >>> second = Moments(np.array(1.0), np.array([4.0]), np.array([0.0]))  # 4
    >>> whole = first.merge(second)                                    # 0, 2, 4
    >>> print(float(whole.count), whole.mean.numpy(), whole.variance.numpy().round(3))
    3.0 [2.] [2.667]
    """

    # A field called `count` hides tuple.count, which nobody needs here.
    count: Tensor
    mean: Tensor
    variance: Tensor

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of elements together.

        With `delta = mean_b - mean_a` and `n = n_a + n_b`:

            mean = mean_a + delta * n_b / n
            n * variance = n_a * variance_a + n_b * variance_b + delta² * n_a * n_b / n

        The differences stay small where the means are large, so nothing cancels as
        it does in E[x²] − E[x]². A side with `count == 0` is ignored, even a NaN.

        Args:
            other: moments of other elements of the same channels.

        Returns:
            `Moments` of the union, with the counts added.

        Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
        for Computing Sample Variances", 1979.

        >>> import numpy as np
        >>> from keras_bn import Moments
        >>> empty = Moments(0.0, np.array([np.nan]), np.array([np.nan]))
        >>> one = Moments(1.0, np.array([3.0]), np.array([0.0]))
        >>> print(empty.merge(one).mean.numpy())
        [3.]
        """
        return merged(self, other, ops)

    def unbiased(self) -> "Moments":
        """The same moments with the unbiased variance, `variance * n / (n - 1)`.

        Returns:
            `Moments` whose variance divides by `count − 1` instead of `count`. Where
            `count` is 1 or less there is no unbiased estimate, and it is NaN.

        >>> import numpy as np
        >>> from keras_bn import Moments
        >>> moments = Moments(np.array(3.0), np.array([2.0]), np.array([2.0]))
        >>> print(moments.unbiased().variance.numpy())
        [3.]
        """
        return corrected(self, ops)


def merged(one: Moments, other: Moments, xp: Any) -> Moments:
    """`one.merge(other)`, computed by `keras.ops` or by `numpy`."""
    count_a, count_b = (_like(m.count, one.mean, xp) for m in (one, other))
    count = count_a + count_b
    share = count_b / xp.where(count > 0, count, xp.ones_like(count))
    has_a, has_b = count_a > 0, count_b > 0
    both = xp.logical_and(has_a, has_b)
    # An empty side usually holds NaN: replace it by 0 before any arithmetic.
    mean_a, variance_a = (_where(has_a, v, xp) for v in one[1:])
    mean_b, variance_b = (_where(has_b, v, xp) for v in other[1:])
    delta = _where(both, mean_b - mean_a, xp)
    mean = xp.where(has_a, mean_a + delta * share, mean_b)
    variance = (
        variance_a * (1.0 - share)
        + variance_b * share
        + delta * delta * (share * (1.0 - share))
    )
    return Moments(count, mean, variance)


def corrected(moments: Moments, xp: Any) -> Moments:
    """`moments.unbiased()`, computed by `keras.ops` or by `numpy`."""
    count = _like(moments.count, moments.mean, xp)
    rest = xp.where(count > 1, count - 1.0, xp.full_like(count, float("nan")))
    moments = of_tensors(moments) if xp is ops else moments
    return Moments(count, moments.mean, moments.variance * (count / rest))


def of_tensors(moments: Moments) -> Moments:
    """The same with tensors for arrays, which PyTorch's tensors don't go with."""
    return Moments(moments.count, *map(to_tensor, moments[1:]))


def to_tensor(value: Tensor) -> Tensor:
    """A tensor as it is, anything else converted: on PyTorch a look is the cheaper."""
    if isinstance(value, keras.Variable):
        return value.value
    return value if ops.is_tensor(value) else ops.convert_to_tensor(value)


def _like(count: Tensor, mean: Tensor, xp: Any) -> Tensor:
    """The count in the dtype of the mean."""
    return ops.cast(count, mean.dtype) if xp is ops else xp.asarray(count, mean.dtype)


def _where(condition: Tensor, value: Tensor, xp: Any) -> Tensor:
    """`value` where `condition` holds, else 0 (a product would keep NaN)."""
    return xp.where(condition, value, xp.zeros_like(value))
