"""The layer in the ways users run it: fit, eager, compiled, sizes unknown."""

import keras
import numpy as np
import pytest
from keras import ops
from support.backend import KERAS_IS_A_JUDGE, array, but_on, only, tf
from support.marks import slow

import keras_bn
from keras_bn.backends import backend
from keras_bn.layer import step

SIZES = only("tensorflow", "elsewhere all sizes are known")
TRACES = only("tensorflow", "elsewhere a trace is of one size, or there is none")


def small_model(cls, dtype="float64"):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Dense(6, dtype=dtype),
            cls(dtype=dtype),
            keras.layers.ReLU(dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        slow({"run_eagerly": True}),
        pytest.param(
            {"jit_compile": True}, marks=but_on("torch", "it needs a C++ compiler")
        ),
        slow({"jit_compile": False}),
    ],
    ids=str,
)
def test_fit_evaluate_predict_follow_keras(options):
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 1, (50, 4)), rng.normal(size=(50, 1))
    results = []
    for cls in (keras.layers.BatchNormalization, keras_bn.BatchNormalization):
        model = small_model(cls)
        model.compile(keras.optimizers.SGD(0.05), "mse", **options)
        # 50 = 3 * 16 + 2: the last batch is smaller.
        model.fit(x, y, batch_size=16, epochs=2, verbose=0, shuffle=False)
        results.append((*model.get_weights(), model.predict(x, verbose=0)))
    rtol, atol = (1e-9, 1e-11) if KERAS_IS_A_JUDGE else (1e-5, 1e-6)
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol, atol)


@SIZES
@pytest.mark.parametrize(
    ("spec", "shape", "axis"),
    [
        ([None, 3], (5, 3), -1),
        ([None, None, None, 3], (2, 4, 5, 3), -1),
        ([None, 3, None, None], (2, 3, 4, 5), 1),
        ([None, None, 3], (4, 6, 3), 2),
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("jit_compile", [True, False])
def test_unknown_sizes(spec, shape, axis, training, jit_compile):
    x = np.random.default_rng(0).normal(3, 2, shape)
    layer, other = (
        keras_bn.BatchNormalization(axis=axis, dtype="float64") for _ in range(2)
    )
    layer.build(spec)
    run = tf.function(
        lambda x: layer(x, training=training),
        input_signature=[tf.TensorSpec(spec, tf.float64)],
        jit_compile=jit_compile,
    )
    # XLA has its own reciprocal square root, right to a few units in the last place.
    np.testing.assert_allclose(
        run(x), other(x, training=training), rtol=1e-12, atol=1e-14
    )
    assert run.get_concrete_function().structured_outputs.shape.as_list() == spec


def test_functional_model_with_unknown_spatial_sizes():
    inputs = keras.Input((None, None, 3))
    outputs = keras_bn.BatchNormalization()(keras.layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, outputs)
    assert outputs.shape == (None, None, None, 4)
    for size in (5, 9):
        x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")
        y = array(model(x, training=True))
        np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)


@TRACES
def test_one_trace_serves_every_batch_size_in_eager_calls():
    traces = []

    @backend.compiled
    def traced(x, *, settings):
        traces.append(x.shape)
        return x * 2

    for batch in range(1, 21):
        x = tf.ones((batch, 3 + batch, 2))
        doubled = traced(x, settings=step.Settings((2,), 1e-3))
        np.testing.assert_array_equal(doubled, 2 * np.ones(x.shape))
    assert traces == [(None, None, 2)]


def test_compiled_puts_absent_arguments_back_in_place():
    @backend.compiled
    def first_given(x, mask, gamma, state, *, settings):
        assert gamma is None
        assert state.updates is None
        return x + state.mean + settings.epsilon, mask, state

    x = ops.ones((2, 3))
    state = step.State(ops.array([1.0, 2.0, 3.0], "float32"), ops.zeros(3))
    mask = ops.array([[True], [False]])
    y, got, new = first_given(x, mask, None, state, settings=step.Settings((1,), 10.0))
    np.testing.assert_array_equal(y, [[12, 13, 14]] * 2)
    np.testing.assert_array_equal(got, mask)
    assert isinstance(new, step.State)
    assert new.updates is None
    np.testing.assert_array_equal(new.mean, state.mean)
    y, mask, _ = first_given(x, None, None, state, settings=step.Settings((1,), 20.0))
    np.testing.assert_array_equal(y, [[22, 23, 24]] * 2)
    assert mask is None


def executed_ops(function):
    """The types of the ops that an eager call of `function` dispatches."""
    from tensorflow.python.framework import op_callbacks

    ops = []

    def record(op_type, inputs, attrs, outputs, op_name=None, graph=None):
        ops.append(op_type if isinstance(op_type, str) else op_type.decode())

    op_callbacks.add_op_callback(record)
    try:
        function()
    finally:
        op_callbacks.remove_op_callback(record)
    return ops


@only("tensorflow", "it is TensorFlow's dispatch that costs")
def test_eager_inference_is_traced_once_for_all_sizes():
    layer, traces = keras_bn.BatchNormalization(), set()
    for rows in (8, 16, 4096, 100_000):
        x = tf.ones((rows, 64))
        layer(x)
        ops = executed_ops(lambda x=x: layer(x, training=False))
        traces |= {op for op in ops if op.startswith("__inference")}
    assert len(traces) == 1


@only("tensorflow", "it is TensorFlow's dispatch that costs")
@pytest.mark.parametrize("training", [True, False])
def test_an_eager_call_is_one_compiled_function(training):
    """One function and the two assignments, not ten ops."""
    x, layer = tf.ones((4, 3)), keras_bn.BatchNormalization()
    layer(x, training=training)
    ops = executed_ops(lambda: layer(x, training=training))
    calls = [op for op in ops if "Call" in op or op.startswith("__inference")]
    assert len(calls) == 1, ops
    assert not {"Mean", "Sum", "Mul", "Sub", "Rsqrt", "Square"} & set(ops), ops
    theirs = keras.layers.BatchNormalization()
    theirs(x, training=training)
    assert "Rsqrt" in executed_ops(lambda: theirs(x, training=training))


def test_stateless_call_leaves_the_layer_alone():
    layer = keras_bn.BatchNormalization(momentum=0.5)
    x = np.random.default_rng(0).normal(3, 1, (8, 2)).astype("float32")
    layer.build(x.shape)
    trainable = [v.value for v in layer.trainable_variables]
    state = [v.value for v in layer.non_trainable_variables]
    _, (mean, variance) = layer.stateless_call(trainable, state, x, training=True)
    np.testing.assert_allclose(mean, 0.5 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, 0.5 + 0.5 * x.var(0), rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean.numpy(), [0, 0])


@pytest.mark.parametrize("synchronized", [False, True])
def test_one_replica_is_plain(synchronized):
    x = np.random.default_rng(0).normal(3, 1, (8, 2))
    layer = keras_bn.BatchNormalization(synchronized=synchronized, dtype="float64")
    y = layer(x, training=True)
    np.testing.assert_allclose(array(y).mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(layer.moving_mean.numpy(), 0.01 * x.mean(0), rtol=1e-12)


def test_inside_a_subclassed_model_and_a_wrapper():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = keras.layers.TimeDistributed(keras_bn.BatchNormalization())

        def call(self, x, training=None):
            return self.bn(x, training=training)

    model = Model()
    x = np.random.default_rng(0).normal(3, 1, (4, 5, 2)).astype("float32")
    model(x, training=True)
    assert model.bn.layer.moving_mean.numpy().all()
    before = model.bn.layer.moving_mean.numpy()
    model(x)
    np.testing.assert_array_equal(model.bn.layer.moving_mean.numpy(), before)


@TRACES
def test_many_layers_are_no_retraces(caplog):
    """Each layer has a trace of its own; TensorFlow must not warn of retracing."""
    for channels in range(1, 12):
        keras_bn.BatchNormalization()(np.ones((2, channels), "float32"), training=True)
    assert "retracing" not in caplog.text


@SIZES
@pytest.mark.parametrize("shape", [(None, 56, 56, 64), (None, 64)])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_an_empty_batch_through_whichever_kernel(shape, mode):
    layer = keras_bn.BatchNormalization()
    layer.build(shape)

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.gradient(y, [x, layer.gamma.value, layer.beta.value])

    if mode == "graph":
        run = tf.function(run, input_signature=[tf.TensorSpec(shape)])
    dx, d_gamma, d_beta = run(tf.zeros((0, *shape[1:])))
    assert dx.shape == (0, *shape[1:])
    np.testing.assert_array_equal(d_gamma, np.zeros(64))
    np.testing.assert_array_equal(d_beta, np.zeros(64))
    np.testing.assert_array_equal(layer.moving_variance.numpy(), np.ones(64))
