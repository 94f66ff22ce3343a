"""What is defined here where Keras's layer is not: see docs/numerics.md."""

import keras
import numpy as np
import pytest
from support import backend
from support.backend import tensor
from support.marks import mostly_slow, slow
from support.steps import MODES, Step, array, in_mode, oracle_step

import keras_bn


def built(shape, **arguments):
    layer = keras_bn.BatchNormalization(**arguments)
    layer.build(shape)
    return layer


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def statistics(layer):
    return layer.moving_mean.numpy(), layer.moving_variance.numpy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape", [(0, 3), slow((0, 4, 3)), (5, 0, 3), slow((0, 2, 2, 3))]
)
def test_empty_batch(shape, mode):
    layer = built((None, *shape[1:]))
    layer.moving_mean.assign([1.0, 2.0, 3.0])
    before = statistics(layer)
    run = in_mode(lambda x: layer(x, training=True), mode, layer.variables)
    assert run(tensor(np.zeros(shape, "float32"))).shape == shape
    for was, now in zip(before, statistics(layer), strict=True):
        np.testing.assert_array_equal(now, was)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", mostly_slow([(0, 3), (0, 2, 3), (2, 0, 3)], [(0, 3)]))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renorm": True},
        {"renorm": True, "scale": False},
        {"renorm": True, "renorm_clipping": {"rmax": 3.0, "rmin": 0.3, "dmax": 5.0}},
        {"debias": True},
    ],
    ids=str,
)
def test_gradients_of_an_empty_batch_are_zero(options, shape, mode):
    layer = built((None, *shape[1:]), **options)
    got = Step(layer, mode)(np.zeros(shape), np.zeros(shape))
    assert got["dx"].shape == shape
    for name in ("d_gamma", "d_beta"):
        np.testing.assert_array_equal(got.get(name, 0), 0, name)
    np.testing.assert_array_equal(got["moving_mean"], 0)
    np.testing.assert_array_equal(got["moving_variance"], 1)


@pytest.mark.parametrize("mode", MODES)
def test_renormalizing_a_batch_that_is_masked_whole(mode):
    x = np.random.default_rng(0).normal(3, 2, (4, 5, 3))
    layer = built(x.shape, renorm=True)
    got = Step(layer, mode, np.zeros((4, 5), bool))(x, np.ones(x.shape))
    assert all(np.isfinite(value).all() for value in got.values())
    np.testing.assert_array_equal(got["moving_mean"], 0)


def test_a_step_of_fit_on_an_empty_batch_leaves_the_weights_alone():
    layer = keras_bn.BatchNormalization(renorm=True)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile("sgd", lambda y, p: keras.ops.sum((y - p) ** 2))
    model.train_on_batch(np.ones((4, 3)), np.zeros((4, 3)))
    before = model.get_weights()
    model.train_on_batch(np.ones((0, 3)), np.zeros((0, 3)))
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(now, was)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [None, 3])
def test_empty_batch_of_unknown_size_has_zero_gradients(size, mode):
    tf = backend.tensorflow("sizes are always known elsewhere")
    layer = built((None, 3), virtual_batch_size=size)

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 2)
        return tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])

    if mode != "eager":
        signature = [tf.TensorSpec([None, 3])]
        run = tf.function(run, input_signature=signature, jit_compile=mode == "xla")
    dx, d_gamma, d_beta = run(tf.zeros((0, 3)))
    assert dx.shape == (0, 3)
    np.testing.assert_array_equal(d_gamma, np.zeros(3))
    np.testing.assert_array_equal(d_beta, np.zeros(3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [np.nan, slow(np.inf), slow(-np.inf)])
@pytest.mark.parametrize(("shape", "axis"), [((16, 4), -1), ((6, 4, 5, 5), 1)])
def test_one_bad_value_costs_its_channel_one_update(shape, axis, bad, mode):
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(2, 3, shape), rng.normal(size=shape)
    layer = built(shape, axis=axis)
    step = Step(layer, mode)
    clean = step(x, upstream)
    first = tuple(0 if a != axis % len(shape) else 2 for a in range(len(shape)))
    x[first] = bad
    dirty = step(x, upstream)
    others = [0, 1, 3]
    for name, initial in (("moving_mean", 0), ("moving_variance", 1)):
        assert dirty[name][2] == initial
        np.testing.assert_array_equal(dirty[name][others], clean[name][others])
    y = np.moveaxis(dirty["y"], axis, -1)
    assert np.isnan(y[..., 2]).any()
    assert np.isfinite(y[..., others]).all()
    assert np.isfinite(dirty["d_gamma"][others]).all()


def test_overflow_of_the_variance_keeps_the_statistics():
    layer = built((4, 2))
    layer(
        np.array([[1, 1e25], [2, -1e25], [3, 1e25], [4, 0]], "float32"), training=True
    )
    mean, variance = statistics(layer)
    assert mean[1] == 0
    assert variance[1] == 1
    assert mean[0] != 0


def test_float16_overflow_under_a_loss_scale_optimizer():
    """The optimizer skips the step; so do the statistics that it would destroy."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, dtype="mixed_float16"),
            keras_bn.BatchNormalization(dtype="mixed_float16"),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))
    model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 4)), rng.normal(size=(32, 1))
    for _ in range(3):
        model.train_on_batch(x, y)
    before = model.get_weights()
    overflow = x.copy()
    overflow[0] = 6e4
    lost = ~np.isfinite(array(model.layers[0](overflow)[0]))
    assert lost.any()
    model.train_on_batch(overflow, y)
    for was, now, variable in zip(
        before, model.get_weights(), model.weights, strict=True
    ):
        assert np.isfinite(now).all()
        keeps = slice(None) if variable.trainable else lost
        np.testing.assert_array_equal(now[keeps], was[keeps])
    model.train_on_batch(x, y)
    assert np.isfinite(model.predict(x, verbose=0)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16"])
def test_weights_are_float32_at_least(dtype):
    layer = built((None, 3), dtype=dtype)
    assert {w.dtype for w in layer.weights} == {"float32"}
    assert dtype_of(layer(np.ones((2, 3)))) == layer.compute_dtype
    assert {w.dtype for w in built((None, 3), dtype="float64").weights} == {"float64"}


def test_float16_statistics_move_as_float32_says():
    layer = built((None, 1), dtype="float16", momentum=0.999)
    layer.moving_mean.assign([0.8])
    expected = np.float32(0.8)
    for _ in range(20):
        layer(np.full((50, 1), 50.0), training=True)
        expected = expected * 0.999 + np.float32(50) * 0.001
    np.testing.assert_allclose(layer.moving_mean.numpy(), [expected], rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_training_as_a_tensor(mode):
    x = np.random.default_rng(0).normal(3, 2, (8, 3)).astype("float32")
    layer, plain = built((None, 3)), built((None, 3))

    def run(x, training):
        return layer(x, training=training)

    run = in_mode(run, mode, layer.variables)
    for training in (False, True, False, True, True):
        got = run(tensor(x), tensor(training))
        np.testing.assert_allclose(
            array(got), array(plain(x, training=training)), rtol=1e-5, atol=1e-6
        )
        for ours, want in zip(statistics(layer), statistics(plain), strict=True):
            np.testing.assert_allclose(ours, want, rtol=1e-6)


@pytest.mark.parametrize("value", [tensor(True), tensor(1), np.bool_(True), 1])
def test_training_in_other_forms(value):
    layer = keras_bn.BatchNormalization()
    layer(np.ones((4, 3), "float32"), training=value)
    assert layer.moving_mean.numpy().all()


def test_training_as_a_tensor_has_the_gradients_of_its_branch():
    x = tensor(np.random.default_rng(0).normal(3, 2, (8, 3)))
    ones = tensor(np.ones((8, 3)))
    layer = built((None, 3), dtype="float64")
    values = [v.value for v in layer.trainable_variables]

    def gradient(x, training):
        def cube(x):
            y = backend.call(layer, values, x, training=training)
            return y**3

        return backend.vjp(cube, [x], ones)[1][0]

    gradient = in_mode(gradient, backend.COMPILED)
    for training in (True, False):
        fixed = built((None, 3), dtype="float64")
        fixed.set_weights(layer.get_weights())

        def cube(x, fixed=fixed, training=training):
            return fixed(x, training=training) ** 3

        step = backend.training_step(cube, fixed.variables, "eager")
        _, (want, *_) = step(x, ones)
        got = gradient(x, tensor(training))
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_training_as_an_input_of_a_model():
    x, flag = keras.Input((3,)), keras.Input(batch_shape=(), dtype="bool")
    layer = keras_bn.BatchNormalization()
    model = keras.Model([x, flag], layer(x, training=flag))
    data = tensor(np.random.default_rng(0).normal(3, 2, (8, 3)), "float32")
    y = array(model([data, tensor(True)]))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    assert layer.moving_mean.numpy().all()
    y = array(model([data, tensor(False)]))
    assert np.abs(y.mean(0)).min() > 0.5


@pytest.mark.parametrize("axis", [[1, 2], slow([2, 1]), slow([-1, 1]), (1, -1)])
@pytest.mark.parametrize("mode", MODES)
def test_list_axes_are_one_channel_axis_of_their_product(axis, mode):
    """Statistics per index over the axes: flattened together, they are channels."""
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(2, 3, (7, 3, 4)), rng.normal(size=(7, 3, 4))
    layer = built((None, 3, 4), axis=axis, dtype="float64")
    assert layer.gamma.shape == layer.moving_variance.shape == (3, 4)
    flat = built((None, 12), dtype="float64")
    gamma = rng.normal(size=12)
    layer.gamma.assign(gamma.reshape(3, 4))
    flat.gamma.assign(gamma)
    got = Step(layer, mode)(x, upstream)
    want = Step(flat, mode)(x.reshape(7, 12), upstream.reshape(7, 12))
    for name in want:
        np.testing.assert_allclose(
            got[name].reshape(want[name].shape), want[name], rtol=1e-12, atol=1e-13
        )
    np.testing.assert_allclose(
        array(layer(x)).reshape(7, 12), array(flat(x.reshape(7, 12))), rtol=1e-12
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", [[0, 2], [1, 3]])
def test_list_axes_apart(axis, mode):
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(2, 3, (3, 4, 2, 5)), rng.normal(size=(3, 4, 2, 5))
    rest = [a for a in range(4) if a not in axis]
    layer = built((3, 4, 2, 5), axis=axis, dtype="float64")
    got = Step(layer, mode)(x, upstream)
    np.testing.assert_allclose(
        got["moving_mean"], 0.01 * x.mean(tuple(rest)), rtol=1e-12, atol=1e-15
    )
    y = (x - x.mean(tuple(rest), keepdims=True)) / np.sqrt(
        x.var(tuple(rest), keepdims=True) + 1e-3
    )
    np.testing.assert_allclose(got["y"], y, rtol=1e-11, atol=1e-13)


def test_a_list_of_one_axis_is_that_axis():
    """As in files of Keras 2, whose configurations say `axis: [3]`."""
    layer = keras_bn.BatchNormalization(axis=[3])
    assert layer.axis == 3
    config = {**keras.layers.BatchNormalization(axis=3).get_config(), "axis": [3]}
    assert keras_bn.BatchNormalization.from_config(config).axis == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [2, 96, 100])
def test_constant_columns_give_zero(rows, mode):
    """0 within float32 rounding of (x − mean), XLA included."""
    values = np.array([1e8, 12345678.0, -3e7, 7.0], "float32")
    layer = built((rows, 4))
    step = Step(layer, mode)
    got = step(
        np.tile(values, (rows, 1)), np.random.default_rng(0).normal(size=(rows, 4))
    )
    assert np.abs(got["y"]).max() < 1e-5
    np.testing.assert_allclose(got["moving_variance"], 0.99, rtol=1e-6)
    np.testing.assert_allclose(got["moving_mean"], 0.01 * values, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mean", [slow(7.0), 9.0, slow(300.0)])
@pytest.mark.parametrize("channel", [0, 3])
def test_means_of_some_deviations_in_one_channel(channel, mean, mode):
    """A backend may treat large means in another way: on both sides it is right."""
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(size=(2, 64, 4))
    x[:, channel] += mean
    x = x.astype("float32")
    layer = built(x.shape)
    got, want = (
        Step(layer, mode)(x, upstream),
        oracle_step(layer, x, upstream, (1,), np.ones(4), np.zeros(4)),
    )
    for name in "y", "dx":
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("policy", [slow("float32"), slow("float64"), "mixed_float16"])
def test_integers_are_cast(dtype, policy):
    x = np.random.default_rng(0).integers(0, 2, (16, 3)).astype(dtype)
    layer, other = built((None, 3), dtype=policy), built((None, 3), dtype=policy)
    y, want = layer(x, training=True), other(x.astype("float32"), training=True)
    assert dtype_of(y) == layer.compute_dtype
    np.testing.assert_allclose(array(y), array(want), rtol=1e-3, atol=1e-6)


def test_large_integers_survive_a_half_precision_policy():
    x = np.array([[70000, 1], [70002, 3]], "int32")
    y = built((None, 2), dtype="mixed_float16")(x, training=True)
    np.testing.assert_allclose(array(y), [[-1, -1], [1, 1]], atol=1e-3)
