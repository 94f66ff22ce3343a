"""Which kernel serves what: the table, what feeds it, and how often it is traced."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from steps import MODES, Step, oracle_step, relative_error, set_parameters

import keras_bn
from keras_bn.kernels import batch, compiled, dispatch, fused, plain
from keras_bn.kernels.dispatch import Known, choose, is_large

NHWC = {"large": True, "axes": (3,)}


@pytest.mark.parametrize(
    ("known", "kernel"),
    [
        ({}, "fused"),
        ({"large": False}, "plain"),
        ({"axes": (1,)}, "fused"),
        ({"axes": (1, 2)}, "plain"),
        ({"dtype": "float16"}, "fused"),
        ({"dtype": "bfloat16"}, "fused"),
        ({"dtype": "float64"}, "plain"),
        ({"special": True}, "plain"),
        ({"xla": True}, "plain"),
        ({"epsilon": 0.0}, "fused"),
        ({"gpu": True}, "fused"),
        ({"gpu": True, "axes": (1,)}, "fused"),
        ({"gpu": True, "large": False}, "fused"),
        ({"gpu": True, "dtype": "float16"}, "fused"),
        ({"gpu": True, "dtype": "bfloat16"}, "plain"),
        ({"gpu": True, "dtype": "float64"}, "plain"),
        ({"gpu": True, "epsilon": 1e-6}, "plain"),
        ({"gpu": True, "xla": True}, "plain"),
        ({"gpu": True, "special": True}, "plain"),
    ],
    ids=str,
)
def test_table(known, kernel):
    assert choose(Known(**NHWC | known)) == kernel


@pytest.mark.parametrize(
    ("shape", "large"),
    [
        ((32, 64), False),
        ((128, 256), False),
        ((8, 7, 7, 64), False),
        ((256, 1024), True),
        ((8192, 256), True),
        ((32, 7, 7, 512), True),
        ((None, 256), False),
        ((None, 7, 7, 64), False),
        ((None, 7, 7, 512), True),
        ((None, 56, 56, 64), True),
        ((None, None, None, 64), True),
        ((None, None, None, 32), False),
        ((0, 56, 56, 64), False),
    ],
    ids=str,
)
def test_sizes(shape, large):
    assert is_large(shape) == large


@pytest.mark.parametrize(
    ("shape", "channels", "strips"),
    [
        ((128, 256), 256, False),
        ((512, 256), 256, True),
        ((256, 512), 512, True),
        ((128, 1024), 1024, False),
        ((128, 8192), 8192, False),
        ((None, 8192), 8192, False),
        ((None, 7, 7, 512), 512, True),
        ((None, 64, 56, 56), 64, True),
        ((0, 56, 56, 64), 64, False),
    ],
    ids=str,
)
def test_sums_by_strips(shape, channels, strips):
    assert dispatch.by_strips(shape, channels) == strips


@pytest.fixture
def kernels(monkeypatch):
    """The kernels that a test traces, by name."""
    seen = []
    for module in (plain, fused):
        name = module.__name__.rsplit(".", 1)[1]
        kernel = module.normalize_batch

        def traced(*args, kernel=kernel, name=name, **kwargs):
            seen.append(name)
            return kernel(*args, **kwargs)

        module_in_use = getattr(batch, name)
        monkeypatch.setattr(module_in_use, "normalize_batch", traced)
    return seen


def call(shape, mask=None, **kwargs):
    layer = keras_bn.BatchNormalization(**kwargs)
    return layer, lambda: layer(tf.zeros(shape), training=True, mask=mask)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(
    ("shape", "options", "kernel"),
    [
        ((32, 64), {}, "plain"),
        ((8, 32, 32, 32), {}, "fused"),
        ((8, 32, 32, 32), {"axis": 1}, "fused"),
        ((8, 32, 32, 32), {"axis": [1, 2]}, "plain"),
        ((8, 32, 32, 32), {"virtual_batch_size": 4}, "plain"),
        ((8, 32, 32, 32), {"dtype": "float64"}, "plain"),
        ((8, 32, 32, 32), {"mask": np.ones((8, 32, 32), bool)}, "plain"),
    ],
    ids=str,
)
def test_the_layer_takes_the_kernel_of_the_table(kernels, mode, shape, options, kernel):
    layer, run = call(shape, **options)
    layer.build(shape)
    (run if mode == "eager" else tf.function(run, autograph=False))()
    # The fused kernel traces the plain one too, for what it leaves to it.
    assert kernels[0] == kernel


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), [((8, 32, 32, 32), -1), ((4096, 40), 1)])
def test_large_steps_of_the_layer_against_the_oracle(mode, shape, axis):
    rng = np.random.default_rng(0)
    layer = keras_bn.BatchNormalization(axis=axis)
    layer.build(shape)
    axes = (axis % len(shape),)
    gamma, beta = rng.normal(1, 0.3, shape[axis]), rng.normal(size=shape[axis])
    set_parameters(layer, gamma, beta)
    x, upstream = rng.normal(1, 2, shape), rng.normal(size=shape)
    x, upstream = x.astype("float32"), upstream.astype("float32")
    got = Step(layer, mode)(x, upstream)
    want = oracle_step(layer, x, upstream, axes, gamma, beta)
    for name, value in want.items():
        assert relative_error(got[name], value) < 1e-5, name


def test_xla_is_seen_from_inside(kernels):
    layer, run = call((8, 32, 32, 32))
    layer.build((8, 32, 32, 32))
    tf.function(run, jit_compile=True, autograph=False)()
    assert set(kernels) == {"plain"}


def test_what_was_traced_outside_of_xla_is_refused_inside():
    """For XLA lowers the fused op to E[x²] − E[x]². Fewer rows are not refused."""
    shape = (64, 32, 32, 32)
    layer = keras_bn.BatchNormalization()
    layer.build(shape)
    traced = tf.function(lambda x: layer(x, training=True), autograph=False)
    outside = traced.get_concrete_function(tf.TensorSpec(shape))
    inside = tf.function(lambda x: outside(x), jit_compile=True, autograph=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="EuclideanNorm"):
        inside(tf.zeros(shape))


def test_eager_calls_choose_by_their_own_size(kernels):
    layer = keras_bn.BatchNormalization()
    layer(tf.zeros([4, 77]), training=True)
    assert kernels == ["plain"]
    layer(tf.zeros([4096, 77]), training=True)
    assert kernels[1] == "fused"


SIZES = range(1, 21)


def test_eager_traces_each_kernel_once(kernels):
    layer = keras_bn.BatchNormalization(axis=-1, epsilon=0.0017)
    for n in SIZES:
        layer(tf.zeros([n, 5, 41]), training=True)
    assert kernels == ["plain"]
    for n in SIZES:
        layer(tf.zeros([1000 * n, 5, 41]), training=True)
    assert kernels.count("fused") == 1


def test_graph_traces_once(kernels):
    layer = keras_bn.BatchNormalization()
    layer.build((None, 5))

    @tf.function(input_signature=[tf.TensorSpec([None, 5])], autograph=False)
    def run(x):
        return layer(x, training=True)

    for n in SIZES:
        run(tf.zeros([n, 5]))
    assert kernels == ["plain"]


def fit(sizes):
    """One epoch of batches of the given sizes."""
    model = keras.Sequential(
        [keras.Input([5]), keras_bn.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile(loss="mse")
    signature = (tf.TensorSpec([None, 5]), tf.TensorSpec([None, 1]))
    data = tf.data.Dataset.from_generator(
        lambda: ((np.ones([n, 5]), np.ones([n, 1])) for n in sizes),
        output_signature=signature,
    )
    model.fit(data, verbose=0, shuffle=False)


def test_fit_traces_no_more_for_many_sizes_than_for_one(kernels):
    fit([4])
    once = len(kernels)
    fit(SIZES)
    assert len(kernels) == 2 * once


def test_inside_an_assumption_shapes_are_not_asked():
    x = tf.zeros([2, 3])
    assert not dispatch.known(x, (1,), 1e-3, False).large
    with dispatch.assuming(True):
        assert dispatch.known(x, (1,), 1e-3, False).large
    assert not dispatch.known(x, (1,), 1e-3, False).large


def test_compiled_functions_are_told_the_size():
    seen = []

    @compiled
    def function(x, mask, *, axes):
        seen.append(dispatch.known(x, axes, 1e-3, False).large)
        return x

    for rows in (8, 16, 100_000, 200_000):
        function(tf.zeros([rows, 4]), None, axes=(1,))
    assert seen == [False, True]
