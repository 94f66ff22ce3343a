"""The layer against Keras's own and against the oracle."""

import functools

import keras
import numpy as np
import oracle
import pytest
from support.backend import COMPILED, KERAS_IS_A_JUDGE, eagerly_too, tensor
from support.errors import assert_not_worse, summed
from support.marks import mostly_slow, mostly_slow_cases, slow
from support.steps import (
    MODES,
    Step,
    array,
    oracle_step,
    relative_error,
    set_parameters,
)

import keras_bn

CASES = [
    ((32, 8), -1),
    ((7, 3), 1),
    ((4, 6), 0),
    ((16, 5, 3), -1),
    ((6, 3, 10), 1),
    ((4, 5, 6, 3), 3),
    ((3, 4, 5, 6), 1),
    ((3, 4, 5, 6), -2),
    ((2, 3, 4, 3, 5), -1),
    ((2, 5, 3, 4, 3), -4),
]
# Those of the default run.
USUAL = [((32, 8), -1), ((6, 3, 10), 1), ((3, 4, 5, 6), -2)]


def pair(**arguments):
    return keras.layers.BatchNormalization(**arguments), keras_bn.BatchNormalization(
        **arguments
    )


@functools.lru_cache(maxsize=1)  # tests that differ in the numbers alone share it
def traced(shape, mode, **arguments):
    """A step of Keras's layer, and one of ours."""
    layers = pair(**arguments)
    for layer in layers:
        layer.build(shape)
    return [Step(layer, mode) for layer in layers]


def both(shape, axis, dtype, mode, offset=3.0, draws=1, **arguments):
    """Random training steps of Keras's layer, of ours, and of the oracle.

    Yields a triple of dicts for each of the draws.
    """
    rng = np.random.default_rng(0)
    # Parameters that every dtype holds exactly.
    gamma, beta = rng.normal(1, 0.5, (2, shape[axis])).astype("float16").astype(float)
    steps = traced(shape, mode, axis=axis, dtype=dtype, **arguments)
    for step in steps:
        set_parameters(step.layer, gamma, beta)
    axes = (axis % len(shape),)
    layer = steps[1].layer
    for _ in range(draws):
        x, upstream = rng.normal(offset, 2.0, shape), rng.normal(size=shape)
        want = oracle_step(layer, x, upstream, axes, gamma, beta)
        yield *(step(x, upstream) for step in steps), want


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), mostly_slow_cases(CASES, USUAL))
def test_float64_is_keras_to_1e_12(shape, axis, mode):
    [(keras_step, our_step, want)] = both(shape, axis, "float64", mode)
    assert our_step.keys() == want.keys()
    for name in want:
        assert relative_error(our_step[name], want[name]) < 1e-12, name
        if KERAS_IS_A_JUDGE:
            assert relative_error(our_step[name], keras_step[name]) < 1e-12, name


def errors_of(draws):
    """The errors of each quantity, ours and Keras's, in each draw."""
    errors = {}
    for keras_step, our_step, want in draws:
        for name in want:
            pair = [relative_error(s[name], want[name]) for s in (our_step, keras_step)]
            if name == "moving_mean":
                # One near 0 is as good as its error in standard deviations.
                pair = np.multiply(pair, min(1, 100 * np.max(np.abs(want[name]))))
            errors.setdefault(name, []).append(pair)
    return errors


@pytest.mark.parametrize("offset", mostly_slow([0.0, 3.0, 1e3, 1e5], [1e3]))
@pytest.mark.parametrize("mode", eagerly_too(MODES))
@pytest.mark.parametrize(
    ("shape", "axis"), [*CASES, ((256, 3), -1), ((8, 16, 16, 4), 3)]
)
def test_float32_error_is_within_the_budget(shape, axis, offset, mode):
    draws = both(shape, axis, "float32", mode, offset=offset, draws=8)
    rows = np.prod(shape) / shape[axis]
    assert_not_worse(errors_of(draws), least=summed(2**-23, rows))


@pytest.mark.parametrize("mode", eagerly_too(MODES))
@pytest.mark.parametrize(
    "dtype", [slow("float16"), "bfloat16", "mixed_float16", slow("mixed_bfloat16")]
)
@pytest.mark.parametrize(("shape", "axis"), [((32, 8), -1), ((3, 4, 5, 6), 1)])
def test_half_precision_error_is_within_the_budget(shape, axis, dtype, mode):
    draws = both(shape, axis, dtype, mode, draws=4)
    assert_not_worse(errors_of(draws), least=2**-8 if "bfloat" in dtype else 2**-11)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_without_scale_or_center(scale, center):
    [(keras_step, our_step, want)] = both(
        (9, 4), -1, "float64", COMPILED, scale=scale, center=center
    )
    assert our_step.keys() == keras_step.keys() == want.keys()
    for name in want:
        assert relative_error(our_step[name], want[name]) < 1e-12, name


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.1])
def test_momentum_and_epsilon(momentum, epsilon):
    [(keras_step, our_step, want)] = both(
        (9, 4), -1, "float64", "eager", momentum=momentum, epsilon=epsilon
    )
    for name in want:
        assert relative_error(our_step[name], want[name]) < 1e-12, name
        if KERAS_IS_A_JUDGE:
            assert relative_error(our_step[name], keras_step[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
@pytest.mark.parametrize(("shape", "axis"), mostly_slow_cases(CASES, USUAL))
def test_inference_is_keras(shape, axis, dtype):
    rng = np.random.default_rng(5)
    x, n = rng.normal(3, 2, shape), shape[axis]
    weights = [rng.normal(size=n) for _ in range(3)] + [rng.uniform(0.1, 4, n)]
    outputs = []
    for layer in pair(axis=axis, dtype=dtype):
        layer.build(shape)
        layer.set_weights(weights)
        outputs.append(array(layer(x.astype(layer.compute_dtype), training=False)))
    if KERAS_IS_A_JUDGE:
        # To the bit: the same operations in the same order.
        np.testing.assert_array_equal(outputs[1], outputs[0])
    else:
        gamma, beta, mean, variance = (w.astype(layer.variable_dtype) for w in weights)
        x = array(tensor(x, layer.compute_dtype))
        want = oracle.normalize(
            x, mean, variance, gamma, beta, (axis % len(shape),), layer.epsilon
        )
        roundings = {"float64": 1e-13, "float32": 1e-5}.get(layer.compute_dtype, 2e-2)
        assert relative_error(outputs[1], want) < roundings
    assert len(layer.weights) == 4
    for weight, value in zip(layer.weights, weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value.astype(weight.dtype))


@pytest.mark.parametrize("training", [None, True, False])
@pytest.mark.parametrize("trainable", [False, True])
def test_modes_of_call(training, trainable):
    """Which statistics are used, and whether they move, as Keras decides it."""
    x = np.random.default_rng(2).normal(3, 2, (16, 4))
    outputs = []
    for layer in pair(dtype="float64"):
        layer.trainable = trainable
        outputs.append(array(layer(x, training=training)))
        outputs.append(array(layer.moving_mean.value))
        outputs.append(array(layer.moving_variance.value))
    tolerance = 1e-12 if KERAS_IS_A_JUDGE else 1e-5
    for theirs, ours in zip(outputs[:3], outputs[3:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance / 1e3)


def test_trainable_flag_as_a_constructor_argument_and_on_a_model():
    model = keras.Sequential([keras.Input((3,)), keras_bn.BatchNormalization()])
    model.trainable = False
    before = model.layers[0].moving_mean.numpy()
    model(np.ones((4, 3), "float32"), training=True)
    np.testing.assert_array_equal(model.layers[0].moving_mean.numpy(), before)
    frozen = keras_bn.BatchNormalization(trainable=False)
    frozen.build((None, 3))
    assert not frozen.trainable
    assert frozen.trainable_weights == []
    assert len(frozen.weights) == 4


def test_positional_arguments_come_in_keras_order():
    values = (1, 0.8, 0.01, False, True, "ones", "zeros", "ones", "zeros")
    theirs, ours = (
        cls(*values)
        for cls in (keras.layers.BatchNormalization, keras_bn.BatchNormalization)
    )
    for name, value in theirs.get_config().items():
        if name not in ("name",):
            assert ours.get_config()[name] == value, name


@pytest.mark.parametrize(
    "shape", [(None, 4), (None, None, 4), (None, 3, None, None, 4)]
)
def test_specs_are_keras(shape):
    theirs, ours = pair()
    for layer in (theirs, ours):
        layer.build(shape)
    assert ours.input_spec.ndim == theirs.input_spec.ndim
    assert ours.input_spec.axes == theirs.input_spec.axes
    assert ours.compute_output_shape(shape) == theirs.compute_output_shape(shape)
    symbolic = keras.KerasTensor(shape)
    ours_out, theirs_out = (la.compute_output_spec(symbolic) for la in (ours, theirs))
    assert (ours_out.shape, ours_out.dtype) == (theirs_out.shape, theirs_out.dtype)
    assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]
    assert [w.path.split("/")[-1] for w in ours.weights] == [
        w.path.split("/")[-1] for w in theirs.weights
    ]


def test_training_a_model_follows_keras():
    """Fifty Adam steps in float64: the same loss curve, weights and statistics."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(160, 6)), rng.integers(0, 3, 160)
    histories, weights = [], []
    for cls in (keras.layers.BatchNormalization, keras_bn.BatchNormalization):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                # The gradient of this bias is nothing but rounding.
                keras.layers.Dense(8, dtype="float64", use_bias=KERAS_IS_A_JUDGE),
                cls(dtype="float64"),
                keras.layers.ReLU(dtype="float64"),
                keras.layers.Dense(3, activation="softmax", dtype="float64"),
            ]
        )
        model.compile("adam", "sparse_categorical_crossentropy")
        fitted = model.fit(x, y, batch_size=16, epochs=5, verbose=0, shuffle=False)
        histories.append(fitted.history["loss"])
        weights.append(model.get_weights())
    # The loss is reported in float32.
    tolerance = 1e-6 if KERAS_IS_A_JUDGE else 1e-4
    np.testing.assert_allclose(histories[1], histories[0], rtol=tolerance)
    tolerance = 1e-9 if KERAS_IS_A_JUDGE else 1e-3
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance / 100)
