"""Gradients of gradients: a gradient penalty must train.

Keras's own layer is no reference here: `tf.nn.moments` stops a gradient that only the
second derivative needs, so its gradient penalties are off by about one in a thousand.
"""

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from support.steps import MODES, array, in_mode, relative_error, set_parameters

import keras_bn

CASES = [((5, 3), -1, False), ((2, 3, 2, 2), 1, False), ((4, 2, 3), -1, True)]


def draw(shape, axis, masked, seed=0):
    rng = np.random.default_rng(seed)
    c = shape[axis]
    parts = {
        "x": rng.normal(2, 1, shape),
        "upstream": rng.normal(size=shape),
        "gamma": rng.normal(1, 0.3, c),
        "beta": rng.normal(size=c),
        "v": rng.normal(size=shape),
        "v_gamma": rng.normal(size=c),
        "v_beta": rng.normal(size=c),
    }
    rest = [n for a, n in enumerate(shape) if a != axis % len(shape)]
    parts["mask"] = rng.random(rest) < 0.7 if masked else None
    return parts


def penalty_gradients(layer, d, mode):
    """d/d(x, gamma, upstream) of <v, dx> + <v_gamma, d_gamma> + <v_beta, d_beta>."""
    gamma, beta = layer.gamma.value, layer.beta.value

    def run(x, upstream):
        with tf.GradientTape() as outer:
            outer.watch([x, upstream])
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = layer(x, training=True, mask=d["mask"])
            first = inner.gradient(y, [x, gamma, beta], output_gradients=upstream)
            penalty = sum(
                tf.reduce_sum(tf.cast(d[v], g.dtype) * g)
                for v, g in zip(("v", "v_gamma", "v_beta"), first, strict=True)
            )
        return outer.gradient(penalty, [x, gamma, upstream])

    dtype = layer.compute_dtype
    tensors = (tf.constant(d["x"], dtype), tf.constant(d["upstream"], dtype))
    return [array(g) for g in in_mode(run, mode)(*tensors)]


def oracle_gradients(d, axes, epsilon):
    def penalty(x, gamma, upstream):
        grads = oracle.backward(x, gamma, axes, epsilon, upstream, d["mask"])
        weights = (d["v"], d["v_gamma"], d["v_beta"])
        return sum((v * g).sum() for v, g in zip(weights, grads, strict=True))

    x, gamma, upstream = d["x"], d["gamma"], d["upstream"]
    return [
        oracle.gradient(lambda v: penalty(v, gamma, upstream), x),
        oracle.gradient(lambda v: penalty(x, v, upstream), gamma),
        oracle.gradient(lambda v: penalty(x, gamma, v), upstream),
    ]


@pytest.mark.parametrize("mode", [*MODES, "functions run eagerly"])
@pytest.mark.parametrize(("shape", "axis", "masked"), CASES)
def test_second_derivatives(shape, axis, masked, mode):
    d = draw(shape, axis, masked)
    layer = keras_bn.BatchNormalization(axis=axis, dtype="float64")
    layer.build(shape)
    set_parameters(layer, d["gamma"], d["beta"])
    tf.config.run_functions_eagerly(mode == "functions run eagerly")
    try:
        got = penalty_gradients(layer, d, "eager" if "eager" in mode else mode)
    finally:
        tf.config.run_functions_eagerly(False)
    want = oracle_gradients(d, (axis % len(shape),), layer.epsilon)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-11


def test_keras_is_no_reference_for_them():
    """Should this fail one day, Keras has mended it and can be compared with."""
    d = draw((5, 3), -1, False)
    layer = keras.layers.BatchNormalization(dtype="float64")
    layer.build((5, 3))
    set_parameters(layer, d["gamma"], d["beta"])
    got = penalty_gradients(layer, d, "eager")
    assert relative_error(got[0], oracle_gradients(d, (1,), layer.epsilon)[0]) > 1e-5


def test_third_derivatives():
    x = np.random.default_rng(0).normal(size=(5, 2))
    layer = keras_bn.BatchNormalization(dtype="float64")
    layer.build((5, 2))

    def nested(x, depth):
        if depth == 0:
            return tf.reduce_sum(tf.sin(layer(x, training=True)))
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = nested(x, depth - 1)
        return tf.reduce_sum(tf.square(tape.gradient(value, x)))

    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = nested(x, 2)
    got = tape.gradient(value, x).numpy()
    h = 1e-6
    for index in np.ndindex(5, 2):
        step = np.zeros((5, 2))
        step[index] = h
        difference = nested(x + step, 2) - nested(x - step, 2)
        np.testing.assert_allclose(
            got[index], difference / (2 * h), rtol=1e-5, atol=1e-6 * np.abs(got).max()
        )


def test_a_gradient_penalty_trains():
    """A critic with a penalty on its gradient: the penalty falls when trained."""
    rng = np.random.default_rng(1)
    keras.utils.set_random_seed(1)
    x = tf.constant(rng.normal(size=(64, 4)), tf.float32)
    model = keras.Sequential(
        [
            keras.layers.Dense(16),
            keras_bn.BatchNormalization(),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(1),
        ]
    )
    model.build((None, 4))
    optimizer = keras.optimizers.Adam(0.01)

    @tf.function
    def train_step():
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                score = tf.reduce_sum(model(x, training=True))
            norms = tf.norm(inner.gradient(score, x), axis=1)
            penalty = tf.reduce_mean(tf.square(norms - 1))
        variables = [v.value for v in model.trainable_variables]
        grads = tape.gradient(
            penalty, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        return penalty

    penalties = [float(train_step()) for _ in range(60)]
    assert np.isfinite(penalties).all()
    assert penalties[-1] < 0.1 * penalties[0]
