"""Gradients of gradients: a gradient penalty must train.

Keras's own layer is no reference here: `tf.nn.moments` stops a gradient that only the
second derivative needs, so its gradient penalties are off by about one in a thousand.
"""

import keras
import numpy as np
import oracle
import pytest
from support import backend
from support.backend import tensor
from support.marks import slow
from support.steps import MODES, array, in_mode, relative_error, set_parameters

import keras_bn

EXTRA = ["functions run eagerly"] if backend.NAME == "tensorflow" else []
CASES = [slow((5, 3), -1, False), ((2, 3, 2, 2), 1, False), slow((4, 2, 3), -1, True)]


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
    dtype = layer.compute_dtype

    def run(x, upstream):
        def penalty(x, gamma, upstream):
            def forward(x, gamma, beta):
                return backend.call(layer, [gamma, beta], x, mask=d["mask"])

            _, first = backend.vjp(forward, [x, gamma, beta], upstream, again=True)
            return sum(
                keras.ops.sum(tensor(d[v], dtype) * g)
                for v, g in zip(("v", "v_gamma", "v_beta"), first, strict=True)
            )

        one = tensor(np.ones(()), dtype)
        return backend.vjp(penalty, [x, gamma, upstream], one)[1]

    tensors = (tensor(d["x"], dtype), tensor(d["upstream"], dtype))
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


@pytest.mark.parametrize("mode", [*MODES, *EXTRA])
@pytest.mark.parametrize(("shape", "axis", "masked"), CASES)
def test_second_derivatives(shape, axis, masked, mode):
    d = draw(shape, axis, masked)
    layer = keras_bn.BatchNormalization(axis=axis, dtype="float64")
    layer.build(shape)
    set_parameters(layer, d["gamma"], d["beta"])
    if mode in EXTRA:
        backend.tf.config.run_functions_eagerly(True)
        try:
            got = penalty_gradients(layer, d, "eager")
        finally:
            backend.tf.config.run_functions_eagerly(False)
    else:
        got = penalty_gradients(layer, d, mode)
    want = oracle_gradients(d, (axis % len(shape),), layer.epsilon)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-11


@backend.only("tensorflow", "it is its moments that stop a gradient")
def test_keras_is_no_reference_for_them():
    """Should this fail one day, Keras has mended it and can be compared with."""
    d = draw((5, 3), -1, False)
    layer = keras.layers.BatchNormalization(dtype="float64")
    layer.build((5, 3))
    set_parameters(layer, d["gamma"], d["beta"])
    got = penalty_gradients(layer, d, "eager")
    assert relative_error(got[0], oracle_gradients(d, (1,), layer.epsilon)[0]) > 1e-5


def test_third_derivatives():
    tf = backend.tensorflow("two derivatives are held elsewhere")
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
    tf = backend.tensorflow("a training step of its own is written in its terms")
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
