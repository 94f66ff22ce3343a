"""The equivalence proof: its reference, its rule, and that a wrong layer fails it."""

import itertools
import math

import keras
import numpy as np
import oracle
import pytest
from keras import ops
from support.backend import NAME, array, but_on
from support.marks import mostly_slow

import keras_bn
from keras_bn.backends import modes
from keras_bn.verify import cases, judge

SHAPE = ((32, 20, 8), -1)
DRAWN = ("gamma", "beta", "moving_mean", "moving_variance")


def drawn(shape, axis, seed=0):
    rng = np.random.default_rng(seed)
    arguments = {name: rng.uniform(0.5, 2, shape[axis]) for name in DRAWN}
    return rng.normal(3, 2, shape), rng.normal(size=shape), arguments


def run(case, seed=0, **layers):
    [record] = judge.verify([case], seed, **layers)
    return record


def failing(record):
    return {check.quantity for check in record.checks if check.strain > 1}


@pytest.mark.parametrize(
    ("shape", "axis"), [((7, 3), -1), ((4, 3, 5), 1), ((2, 3, 4, 2), -1)]
)
def test_reference_gradients_are_its_finite_differences(shape, axis):
    x, upstream, arguments = drawn(shape, axis)

    def loss(**changed):
        inputs = {"x": x, **arguments, **changed}
        results = judge.reference(
            upstream=upstream, axis=axis, momentum=0.9, epsilon=1e-3, **inputs
        )
        return np.sum(upstream * results["output"])

    results = judge.reference(
        x, upstream, axis=axis, momentum=0.9, epsilon=1e-3, **arguments
    )
    for name, point in (("x", x), *arguments.items()):
        if name.startswith("moving"):
            continue
        numeric = np.empty(point.shape)
        for index in np.ndindex(point.shape):
            step = np.zeros(point.shape)
            step[index] = 1e-6
            rise = loss(**{name: point + step}) - loss(**{name: point - step})
            numeric[index] = rise / 2e-6
        np.testing.assert_allclose(results[f"d{name}"], numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("shape", "axis"), cases.SHAPES)
def test_reference_is_the_oracle(shape, axis):
    x, upstream, arguments = drawn(shape, axis)
    gamma, beta, mean, variance = arguments.values()
    axes = (axis % len(shape),)
    _, batch_mean, batch_variance = oracle.moments(x, axes)
    dx, dgamma, dbeta = oracle.backward(x, gamma, axes, 1e-3, upstream)
    want = {
        "output": oracle.forward(x, gamma, beta, axes, 1e-3),
        "dx": dx,
        "dgamma": dgamma,
        "dbeta": dbeta,
        "moving mean": oracle.moving(mean, batch_mean, 0.9),
        "moving variance": oracle.moving(variance, batch_variance, 0.9),
        "inference": oracle.normalize(x, mean, variance, gamma, beta, axes, 1e-3),
    }
    got = judge.reference(
        x, upstream, axis=axis, momentum=0.9, epsilon=1e-3, **arguments
    )
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-11, atol=1e-12)


def test_cases_cover_what_is_promised():
    every, quick = cases.cases(), cases.cases(quick=True)
    assert set(quick) < set(every)
    assert len(set(every)) == len(every)
    layouts = [(2, -1), *((rank, axis) for rank in (3, 4, 5) for axis in (-1, 1))]
    assert {((len(c.shape), c.axis), c.dtype, c.mode) for c in every} == set(
        itertools.product(layouts, cases.DTYPES, modes.MODES)
    )
    assert {c.shape for c in quick} == {c.shape for c in every}
    assert {c.dtype for c in quick} == {c.dtype for c in every}
    assert {c.mean for c in quick} == {cases.MEAN, *cases.LARGE_MEANS}


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_inputs_are_numbers_of_the_dtype(dtype):
    policy = keras.DTypePolicy(dtype)
    draw = cases.draw(cases.Case(*SHAPE, dtype, "eager"), np.random.default_rng((0, 0)))
    for name, values in draw.items():
        held = policy.variable_dtype if name in DRAWN else policy.compute_dtype
        again = array(ops.cast(values, held))
        np.testing.assert_array_equal(again, values)


def test_the_seed_decides_the_numbers():
    case = cases.Case(*SHAPE, "float32", "eager")
    assert run(case, seed=3) == run(case, seed=3) != run(case, seed=4)


class WrongEpsilon(keras_bn.BatchNormalization):
    def __init__(self, epsilon=1e-3, **arguments):
        super().__init__(epsilon=epsilon * 1.01, **arguments)


class WrongMomentum(keras_bn.BatchNormalization):
    def __init__(self, momentum=0.99, **arguments):
        super().__init__(momentum=momentum + 1e-5, **arguments)


class UnbiasedVariance(keras_bn.BatchNormalization):
    def call(self, inputs, training=None):
        old = self.moving_variance + 0.0
        y = super().call(inputs, training=training)
        if training:
            n = math.prod(inputs.shape) / inputs.shape[self.axis]
            step = self.moving_variance - old * self.momentum
            self.moving_variance.assign(old * self.momentum + step * n / (n - 1))
        return y


class WrongInputGradient(keras_bn.BatchNormalization):
    """The output's value, with a little too much of the mean's gradient."""

    def call(self, inputs, training=None):
        y = super().call(inputs, training=training)
        rest = [a for a in range(len(inputs.shape)) if a != self.axis % len(y.shape)]
        mean = ops.mean(inputs, rest, keepdims=True)
        return y + ops.cast(1e-4 * (mean - ops.stop_gradient(mean)), y.dtype)


class WrongSign(keras_bn.BatchNormalization):
    """Of beta."""

    def call(self, inputs, training=None):
        y = super().call(inputs, training=training)
        return y - 2 * ops.cast(self.beta, y.dtype)


class NoGradient(keras_bn.BatchNormalization):
    def call(self, inputs, training=None):
        return ops.stop_gradient(super().call(inputs, training=training))


class BatchStatisticsInInference(keras_bn.BatchNormalization):
    def call(self, inputs, training=None):
        if training:
            return super().call(inputs, training=True)
        weights = [w + 0.0 for w in self.non_trainable_variables]
        y = super().call(inputs, training=True)
        for weight, value in zip(self.non_trainable_variables, weights, strict=True):
            weight.assign(value)
        return y


class NotFinite(keras_bn.BatchNormalization):
    def call(self, inputs, training=None):
        y = super().call(inputs, training=training)
        return y if training else ops.where(y == ops.max(y), float("nan"), y)


class ChannelsSwapped(keras_bn.BatchNormalization):
    def set_weights(self, weights):
        super().set_weights([weights[0][::-1], *weights[1:]])


class HalfStatistics(keras_bn.BatchNormalization):
    """The moving mean takes in a mean rounded to the compute dtype."""

    def call(self, inputs, training=None):
        old = self.moving_mean + 0.0
        y = super().call(inputs, training=training)
        if training:
            mean = ops.mean(inputs, list(range(len(inputs.shape) - 1)))
            step = ops.cast(mean, old.dtype) * (1 - self.momentum)
            self.moving_mean.assign(old * self.momentum + step)
        return y


class MeanOfSquares(keras_bn.BatchNormalization):
    """E[x²] − E[x]²."""

    def call(self, inputs, training=None):
        old = self.moving_variance + 0.0
        y = super().call(inputs, training=training)
        if training:
            rest = list(range(len(inputs.shape) - 1))
            variance = ops.mean(inputs**2, rest) - ops.mean(inputs, rest) ** 2
            self.moving_variance.assign(
                old * self.momentum + variance * (1 - self.momentum)
            )
        return y


BROKEN = [
    (WrongEpsilon, "float64", {"output", "dx", "dgamma", "inference"}),
    *(
        pytest.param(
            *case, marks=but_on("torch", "sums there are expected to be off by as much")
        )
        for case in (
            (WrongEpsilon, "float32", {"output", "dx", "dgamma", "inference"}),
            (WrongMomentum, "float32", {"moving mean", "moving variance"}),
        )
    ),
    (UnbiasedVariance, "float64", {"moving variance"}),
    (UnbiasedVariance, "float32", {"moving variance"}),
    (UnbiasedVariance, "mixed_bfloat16", {"moving variance"}),
    (BatchStatisticsInInference, "float16", {"inference"}),
    (WrongInputGradient, "float32", {"dx"}),
    (WrongSign, "float32", {"output", "dbeta", "inference"}),
    (BatchStatisticsInInference, "mixed_float16", {"inference"}),
    (NotFinite, "float32", {"inference"}),
    (ChannelsSwapped, "mixed_bfloat16", {"output", "dx", "inference"}),
    (HalfStatistics, "mixed_float16", {"moving mean"}),
    (HalfStatistics, "mixed_bfloat16", {"moving mean"}),
]


@pytest.mark.parametrize(
    "mode", mostly_slow(sorted({"eager", modes.USUAL}), [modes.USUAL])
)
@pytest.mark.parametrize(("broken", "dtype", "quantities"), BROKEN)
def test_a_wrong_layer_fails_where_it_is_wrong(broken, dtype, quantities, mode):
    case = cases.Case(*SHAPE, dtype, mode)
    assert run(case).verdict == "PASS"
    record = run(case, ours=broken)
    assert record.verdict == "FAIL"
    assert record.worst.quantity in failing(record)
    assert failing(record) == quantities


def test_large_means_tell_two_passes_from_one():
    near = cases.Case(*SHAPE, "float32", modes.USUAL, mean=0.0)
    far = cases.Case(*SHAPE, "float32", modes.USUAL, mean=1e3)
    assert run(far).verdict == "PASS"
    assert run(near, ours=MeanOfSquares).verdict == "PASS"
    assert failing(run(far, ours=MeanOfSquares)) == {"moving variance"}


def test_missing_gradients_fail():
    record = run(cases.Case(*SHAPE, "float32", "eager"), ours=NoGradient)
    assert record.verdict == "FAIL"
    if NAME == "jax":  # where what has no gradient has one of zeros
        assert failing(record) == {"dx", "dgamma", "dbeta"}
        return
    assert not record.checks
    if NAME == "tensorflow":  # PyTorch raises itself
        assert "dx has the shape ()" in record.failure


def test_an_error_of_our_layer_is_a_failure():
    class Raises(keras_bn.BatchNormalization):
        def build(self, input_shape):
            raise MemoryError("too large")

    record = run(cases.Case(*SHAPE, "float32", "eager"), ours=Raises)
    assert (record.verdict, record.checks) == ("FAIL", ())
    assert record.failure == "MemoryError: too large"


def test_an_error_of_keras_leaves_nothing_to_compare():
    class Unsupported(keras.layers.BatchNormalization):
        def call(self, inputs, training=None):
            raise RuntimeError("no such kernel\non this device")

    case = cases.Case(*SHAPE, "float32", "eager")
    passing = run(case)
    record = run(case, theirs=Unsupported)
    assert record.verdict == "skip"
    assert "no such kernel" in record.skipped
    assert "\n" not in record.skipped
    assert not judge.passed([record])
    assert judge.passed([record, passing])


def test_what_passes():
    def strain(ours, limit=1.0, **arguments):
        return judge.Check("dx", ours, 0.5, limit=limit, **arguments).strain

    assert strain(1.0, difference=0.0) == 1
    assert strain(1.1, difference=0.0) > 1
    assert strain(0.1, difference=2.0, difference_limit=1.0) > 1
    assert strain(math.inf, difference=math.inf, limit=math.inf) > 1
    assert strain(0.1, difference=math.inf, limit=math.inf) <= 1


def test_no_records_prove_nothing():
    assert not judge.passed([])


@pytest.mark.parametrize("mode", ["tf.function", "jit_compile", None])
def test_unknown_modes_are_refused(mode):
    with pytest.raises(ValueError, match="mode="):
        modes.in_mode(ops.abs, [], mode)
