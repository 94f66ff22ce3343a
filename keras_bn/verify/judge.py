r"""The proof that the layer computes what Keras's computes, on this machine.

Both layers get the same random numbers, already rounded to the dtype. Both are compared
with the same arithmetic in float64 NumPy. The error of a quantity is

$$\max |\text{result} - \text{reference}| \,/\, \max |\text{reference}|,$$

the mean over a few random draws, since one may be small by luck. The quantities are the
output, the gradients with respect to input, gamma and beta for a random upstream
gradient, the new moving mean and moving variance, and the output in inference.

In float64, our result may differ by at most 1e-12 from the reference, and from Keras's
where that is as exact. In any other dtype, our error may be at most three times
Keras's, and in training at most 1e-3, or what one rounding in half precision makes:
with large means, Keras's layer has errors of any size. Keras's error counts as at least

- the machine epsilon for quantities in float32, and half of it for those in half
  precision, which are computed in float32 and rounded once: smaller errors are luck;
- with inputs in half precision, or where the backend's op adds up one row after another
  (PyTorch), $\sqrt n$ float32 epsilons for sums over the $n$ elements of a channel
  (gradients of gamma and beta, moving statistics). This is the expected rounding error
  of a sum (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis",
  2019). With few bits in the inputs, a sum may also be exact, depending on the order
  of its terms.
"""

import math
import platform
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import keras
import numpy as np
from keras import ops

from keras_bn.backends import modes
from keras_bn.layer import BatchNormalization
from keras_bn.verify import cases
from keras_bn.version import __version__

# Keras's error counts as at least this, by the dtype of the result.
LEAST_ERROR = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}
FLOAT64_LIMIT = 1e-12
# Keras may be further off than this in training, but not we.
LARGEST_ERROR = 1e-3
DRAWS = 4
SUMS = ("dgamma", "dbeta", "moving mean", "moving variance")

# A low momentum, so that errors of the batch statistics show in the moving ones.
ARGUMENTS = {"momentum": 0.5, "epsilon": 1e-3}


@dataclass(frozen=True)
class Check:
    """The errors of one quantity, relative to its largest value.

    Args:
        quantity: its name.
        ours, keras: of each layer against the reference, the mean over the draws.
        difference: between the two layers, the largest of the draws.
        limit: the maximum of `ours`.
        difference_limit: the maximum of `difference`.
    """

    quantity: str
    ours: float
    keras: float
    difference: float
    limit: float
    difference_limit: float = math.inf

    @property
    def strain(self) -> float:
        """The error as a fraction of its limit; above 1 it fails."""
        if not math.isfinite(self.ours):
            return math.inf
        return max(self.ours / self.limit, self.difference / self.difference_limit)


@dataclass(frozen=True)
class Record:
    """The result of one case.

    Args:
        case: the `Case`.
        checks: a `Check` for each quantity; none if a layer raised an error.
        failure: the error that our layer raised.
        skipped: the error that Keras's layer raised, so nothing can be compared.
    """

    case: cases.Case
    checks: tuple[Check, ...] = ()
    failure: str | None = None
    skipped: str | None = None

    @property
    def verdict(self) -> str:
        """ "PASS", "FAIL" or "skip"."""
        if self.skipped is not None:
            return "skip"
        passed = self.worst is not None and self.worst.strain <= 1
        return "PASS" if passed else "FAIL"

    @property
    def worst(self) -> Check | None:
        """The check with the largest strain."""
        return max(self.checks, key=lambda check: check.strain, default=None)

    def to_dict(self) -> dict:
        """The record in plain types."""
        checks = {check.quantity: asdict(check) for check in self.checks}
        for check in checks.values():
            del check["quantity"]
        return {
            **asdict(self.case),
            "verdict": self.verdict,
            "checks": checks,
            "failure": self.failure,
            "skipped": self.skipped,
        }


def verify(
    settings: Iterable[cases.Case],
    seed: int = 0,
    ours: type[keras.Layer] = BatchNormalization,
    theirs: type[keras.Layer] = keras.layers.BatchNormalization,
) -> Iterator[Record]:
    """Compare this package's layer with Keras's, one case after the other.

    Args:
        settings: the cases, such as `cases.cases()`.
        seed: not negative, of the random inputs, parameters and upstream gradients.
        ours, theirs: the classes of the layers.

    Yields:
        A `Record` for each case.

    Example:

    >>> case = cases.Case((32, 4), axis=-1, dtype="float64", mode="eager")
    >>> [record] = verify([case])
    >>> record.verdict
    'PASS'
    """
    for case in settings:
        yield _compare(case, seed, ours, theirs)


def passed(records: Iterable[Record]) -> bool:
    """Whether at least one comparison passed and none failed."""
    verdicts = {record.verdict for record in records}
    return "PASS" in verdicts and "FAIL" not in verdicts


def environment() -> dict[str, str]:
    """The versions and the device of the comparison."""
    return {
        "keras_bn": __version__,
        "keras": keras.__version__,
        keras.backend.backend(): modes.VERSION,
        "python": platform.python_version(),
        "device": modes.device(),
    }


def reference(
    x, upstream, gamma, beta, moving_mean, moving_variance, *, axis, momentum, epsilon
):
    r"""One training step and one inference, in plain float64 NumPy.

    $$\hat x = \frac{x-\bar x}{\sqrt{s^2+\epsilon}}, \quad y = \gamma\hat x+\beta,
      \quad d\beta = \sum g, \quad d\gamma = \sum g\,\hat x, \quad
      dx = \frac{\gamma}{\sqrt{s^2+\epsilon}}
           \Bigl(g - \frac{d\beta + \hat x\,d\gamma}{n}\Bigr)$$

    Args:
        x, upstream: arrays of one shape: the input and the gradient $g$.
        gamma, beta, moving_mean, moving_variance: one value per channel.
        axis: the channel axis.
        momentum, epsilon: as in the layer.

    Returns:
        A dict of arrays: "output", "dx", "dgamma", "dbeta", the new "moving mean" and
        "moving variance", and "inference" with the old ones.
    """
    x = np.moveaxis(x, axis, -1)
    g = np.moveaxis(upstream, axis, -1)
    rows = tuple(range(x.ndim - 1))
    n = x[..., 0].size
    mean = x.mean(rows)
    variance = np.square(x - mean).mean(rows)
    std = np.sqrt(variance + epsilon)
    normalized = (x - mean) / std
    dbeta, dgamma = g.sum(rows), (g * normalized).sum(rows)
    dx = gamma / std * (g - (dbeta + normalized * dgamma) / n)
    inference = (x - moving_mean) / np.sqrt(moving_variance + epsilon)
    return {
        "output": np.moveaxis(gamma * normalized + beta, -1, axis),
        "dx": np.moveaxis(dx, -1, axis),
        "dgamma": dgamma,
        "dbeta": dbeta,
        "moving mean": moving_mean * momentum + mean * (1 - momentum),
        "moving variance": moving_variance * momentum + variance * (1 - momentum),
        "inference": np.moveaxis(gamma * inference + beta, -1, axis),
    }


def _compare(case, seed, ours, theirs):
    draws = [cases.draw(case, np.random.default_rng((seed, i))) for i in range(DRAWS)]
    want = _stack(reference(**draw, axis=case.axis, **ARGUMENTS) for draw in draws)
    # An error of a layer on this device is a result too: go on with the next case.
    try:
        their_results = _stack(_results(theirs, case, draws))
    except Exception as error:
        return Record(case, skipped=_summary(error))
    try:
        our_results = _stack(_results(ours, case, draws))
    except Exception as error:
        return Record(case, failure=_summary(error))
    results = our_results, their_results, want
    return Record(case, tuple(_check(case, quantity, *results) for quantity in want))


def _results(layer_class, case, draws):
    """The results of a layer for each draw, named as those of `reference`."""
    layer = layer_class(axis=case.axis, dtype=case.dtype, **ARGUMENTS)
    layer.build(case.shape)
    variables = layer.variables
    infer = modes.in_mode(lambda x: layer(x, training=False), variables, case.mode)
    train = modes.with_gradients(
        lambda x: layer(x, training=True), variables, case.mode
    )
    weights = ("gamma", "beta", "moving_mean", "moving_variance")
    for draw in draws:
        layer.set_weights([draw[name] for name in weights])
        x = ops.cast(draw["x"], layer.compute_dtype)
        upstream = ops.cast(draw["upstream"], layer.compute_dtype)
        if (dtype := keras.backend.standardize_dtype(x.dtype)) != layer.compute_dtype:
            raise TypeError(f"{layer.compute_dtype} is not enabled: arrays are {dtype}")
        inference = infer(x)
        y, (dx, dgamma, dbeta) = train(x, upstream)
        results = {
            "output": y,
            "dx": dx,
            "dgamma": dgamma,
            "dbeta": dbeta,
            "moving mean": layer.moving_mean,
            "moving variance": layer.moving_variance,
            "inference": inference,
        }
        results = {quantity: _array(tensor) for quantity, tensor in results.items()}
        for quantity, array in results.items():
            shape = layer.gamma.shape if quantity in SUMS else case.shape
            if array.shape != shape:
                raise ValueError(f"{quantity} has the shape {array.shape}, not {shape}")
        yield results


def _summary(error):
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _array(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def _stack(results):
    """Dicts of arrays, one for each draw, as a dict of arrays `(draws, ...)`."""
    results = list(results)
    return {name: np.stack([r[name] for r in results]) for name in results[0]}


def _check(case, quantity, ours, theirs, want):
    """The `Check` of one quantity, from results of all draws."""

    def largest(values):
        return np.abs(values).reshape(DRAWS, -1).max(1)

    def errors(one, other):
        gaps = largest(one[quantity] - other[quantity]) / largest(want[quantity])
        return np.where(np.isnan(gaps), math.inf, gaps)

    keras_error = float(errors(theirs, want).mean())
    return Check(
        quantity,
        float(errors(ours, want).mean()),
        keras_error,
        float(errors(ours, theirs).max()),
        *_limits(case, quantity, keras_error),
    )


def _limits(case, quantity, keras_error):
    """The maxima of our error and of the difference to Keras's result."""
    dtype = keras.DTypePolicy(case.dtype).compute_dtype
    if dtype == "float64":
        # Keras computes float64 in float32 on PyTorch and JAX.
        exact = keras_error <= FLOAT64_LIMIT
        return FLOAT64_LIMIT, FLOAT64_LIMIT if exact else math.inf
    least = LEAST_ERROR[dtype]
    if quantity in SUMS and (dtype != "float32" or modes.SUMS_IN_ORDER):
        n = math.prod(case.shape) / case.shape[case.axis]
        least = math.sqrt(n) * LEAST_ERROR["float32"]
    limit = 3 * max(keras_error, least)
    if quantity != "inference":
        limit = min(limit, max(LARGEST_ERROR, 3 * least))
    return limit, math.inf
