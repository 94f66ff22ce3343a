"""Every kernel against the oracle, and none less accurate than it may be."""

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from steps import array, in_mode, relative_error

import keras_bn
from keras_bn import bench
from keras_bn.kernels import dispatch, fused, modes, plain

EPSILON = 1e-3
NAMES = ("y", "mean", "variance", "dx", "d_gamma", "d_beta")


def run_plain(x, gamma, beta, axes):
    return plain.normalize_batch(x, None, gamma, beta, axes=axes, epsilon=EPSILON)


def run_strips(x, gamma, beta, axes):
    """The plain kernel as XLA gets it for the largest inputs, whatever the size."""
    with dispatch.assuming(strips=True):
        return run_plain(x, gamma, beta, axes)


def run_fused(x, gamma, beta, axes):
    return fused.normalize_batch(x, gamma, beta, axes=axes, epsilon=EPSILON)


def run_keras(x, gamma, beta, axes):
    """Keras's arithmetic, on the moments that its layer takes."""
    rows = [a for a in range(len(x.shape)) if a not in axes]
    wide = tf.cast(x, tf.float32)
    mean, variance = tf.nn.moments(wide, rows, keepdims=True)
    gamma, beta = (tf.reshape(v, mean.shape) for v in (gamma, beta))
    y = tf.nn.batch_normalization(wide, mean, variance, beta, gamma, EPSILON)
    moments = (tf.reshape(m, [-1]) for m in (mean, variance))
    return tf.cast(y, x.dtype), (None, *moments)


# XLA lowers the fused op to E[x²] − E[x]²: the dispatch never sends it there.
WAYS = {
    "plain": (run_plain, "graph"),
    "plain under XLA": (run_plain, "xla"),
    "plain under XLA, in strips": (run_strips, "xla"),
    "fused": (run_fused, "graph"),
}
SHAPES = [
    ((6, 5), (1,)),
    ((4, 3, 5), (2,)),
    ((4, 3, 5), (1,)),
    ((3, 4, 2, 6), (3,)),
    ((3, 6, 4, 2), (1,)),
    ((2, 3, 2, 4, 5), (4,)),
    ((2, 5, 3, 2, 4), (1,)),
    ((16, 5), (1,)),
    ((2, 8, 3, 6), (3,)),
    ((3, 4, 2, 6), (2, 3)),
    ((3, 8, 4, 6), (1,)),
    ((3, 2, 3, 8), (1, 2)),
]


def draw(shape, axes, mean=0.5, seed=0):
    rng = np.random.default_rng(seed)
    along = [shape[a] for a in axes]
    x = rng.normal(mean, 1, shape).astype("float32")
    upstream = rng.normal(size=shape).astype("float32")
    gamma = rng.normal(1, 0.3, along).astype("float32")
    return x, upstream, gamma, rng.normal(size=along).astype("float32")


def step(way, x, upstream, gamma, beta, axes, unknown_sizes=False):
    """Output, moments and gradients by one kernel in one mode."""
    kernel, mode = way

    def run(x, upstream, gamma, beta):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, (_, mean, variance) = kernel(x, gamma, beta, axes)
        grads = tape.gradient(y, [x, gamma, beta], output_gradients=upstream)
        return y, mean, variance, *grads

    function = in_mode(run, mode)
    if unknown_sizes:
        sizes = [n if a in axes else None for a, n in enumerate(x.shape)]
        per_channel = tf.TensorSpec(gamma.shape)
        spec = [tf.TensorSpec(sizes, x.dtype)] * 2 + [per_channel] * 2
        function = tf.function(run, input_signature=spec, jit_compile=mode == "xla")
    results = function(*(tf.constant(t) for t in (x, upstream, gamma, beta)))
    return dict(zip(NAMES, map(array, results), strict=True))


def oracle_step(x, upstream, gamma, beta, axes):
    _, mean, variance = oracle.moments(x, axes)
    dx, d_gamma, d_beta = oracle.backward(x, gamma, axes, EPSILON, upstream)
    y = oracle.forward(x, gamma, beta, axes, EPSILON)
    return dict(zip(NAMES, (y, mean, variance, dx, d_gamma, d_beta), strict=True))


@pytest.mark.parametrize("unknown_sizes", [False, True], ids=["static", "unknown"])
@pytest.mark.parametrize(
    ("way", "shape", "axes"),
    [
        (way, shape, axes)
        for way in WAYS
        for shape, axes in SHAPES
        if way != "fused" or len(axes) == 1
    ],
    ids=str,
)
def test_against_the_oracle(way, shape, axes, unknown_sizes):
    data = draw(shape, axes)
    got = step(WAYS[way], *data, axes, unknown_sizes)
    want = oracle_step(*data, axes)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("mean", [0.0, 2.0, 3.5, 7.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize(
    "shape", [(64, 8), (8, 16, 16, 4), (1569, 32), (32768, 8)], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_error_is_at_most_twice_keras(way, shape, mean):
    axes = (len(shape) - 1,)
    data = draw(shape, axes, mean)
    want = oracle_step(*data, axes)
    got = step(WAYS[way], *data, axes)
    keras_mode = "xla" if "XLA" in way else "graph"
    reference = step((run_keras, keras_mode), *data, axes)
    for name, value in want.items():
        # Some 50 roundings, below which both are as good as exact, and one luckier.
        floor = 3e-6
        allowed = max(2 * relative_error(reference[name], value), floor)
        assert relative_error(got[name], value) <= allowed, name


@pytest.mark.parametrize("value", [1.0, 1e4 + 0.1, 1e8])
@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("way", WAYS)
def test_constant_columns_give_beta(way, rows, value):
    x, upstream, gamma, beta = draw((rows, 3), (1,))
    x[:, 1] = value
    got = step(WAYS[way], x, upstream, gamma, beta, (1,))
    np.testing.assert_allclose(got["y"][:, 1], beta[1], rtol=0, atol=1e-3)
    assert got["variance"][1] < 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("shape", "axes"), [((64, 5), (1,)), ((4, 8, 8, 5), (3,))])
@pytest.mark.parametrize("way", WAYS)
def test_a_bad_value_stays_in_its_channel(way, shape, axes, bad):
    data = draw(shape, axes)
    clean = step(WAYS[way], *data, axes)
    data[0][(1,) * (len(shape) - 1) + (2,)] = bad
    got = step(WAYS[way], *data, axes)
    assert not np.isfinite(got["variance"][2])
    assert not np.isfinite(got["y"][..., 2]).any()
    others = [0, 1, 3, 4]
    for name in got:
        np.testing.assert_allclose(
            got[name][..., others], clean[name][..., others], atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 4, 3)], ids=str)
@pytest.mark.parametrize("way", ["plain", "fused"])
def test_empty_batch(way, shape):
    data = draw(shape, (len(shape) - 1,))
    got = step(WAYS[way], *data, (len(shape) - 1,), unknown_sizes=True)
    assert got["y"].shape == got["dx"].shape == shape
    np.testing.assert_array_equal(got["d_beta"], 0)
    np.testing.assert_array_equal(got["d_gamma"], 0)


@pytest.mark.parametrize("way", WAYS)
def test_one_element_per_channel_has_no_variance(way):
    got = step(WAYS[way], *draw((1, 4), (1,)), (1,))
    np.testing.assert_array_equal(got["variance"], 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_half_types_keep_float32_statistics(way, dtype):
    axes = (1,)
    x, upstream, gamma, beta = draw((512, 4), axes, mean=20)
    x, upstream = (array(tf.cast(t, dtype)) for t in (x, upstream))
    cast = tf.cast(x, dtype), tf.cast(upstream, dtype), gamma, beta
    got, want = (
        step(WAYS[way], *cast, axes),
        oracle_step(x, upstream, gamma, beta, axes),
    )
    reference = step((run_keras, "graph"), *cast, axes)
    for name in want:
        allowed = max(2 * relative_error(reference[name], want[name]), 3e-6)
        assert relative_error(got[name], want[name]) <= allowed, name


@pytest.mark.parametrize("way", WAYS)
def test_an_upstream_gradient_may_be_wider_than_the_output(way):
    x, upstream, gamma, beta = draw((64, 4), (1,))
    x, narrow = (tf.cast(t, "bfloat16") for t in (x, upstream))
    want = step(WAYS[way], x, narrow, gamma, beta, (1,))
    got = step(WAYS[way], x, tf.cast(narrow, "float32"), gamma, beta, (1,))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-2, err_msg=name)


@pytest.mark.parametrize(("shape", "axes"), [((5, 3), (1,)), ((2, 3, 2, 2), (1,))])
@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives(way, shape, axes):
    x, upstream, gamma, beta = draw(shape, axes)
    rng = np.random.default_rng(1)
    v = [rng.normal(size=t.shape).astype("float32") for t in (x, gamma, beta)]
    kernel, mode = WAYS[way]

    def run(x, upstream, gamma, beta):
        with tf.GradientTape() as outer:
            outer.watch([x, upstream, gamma])
            with tf.GradientTape() as inner:
                inner.watch([x, gamma, beta])
                y, _ = kernel(x, gamma, beta, axes)
            first = inner.gradient(y, [x, gamma, beta], output_gradients=upstream)
            penalty = tf.add_n(
                [tf.reduce_sum(w * g) for w, g in zip(v, first, strict=True)]
            )
        return outer.gradient(penalty, [x, gamma, upstream])

    def penalty(x, gamma, upstream):
        first = oracle.backward(x, gamma, axes, EPSILON, upstream)
        return sum((w * g).sum() for w, g in zip(v, first, strict=True))

    tensors = [tf.constant(t) for t in (x, upstream, gamma, beta)]
    got = in_mode(run, mode)(*tensors)
    want = (
        oracle.gradient(lambda t: penalty(t, gamma, upstream), x),
        oracle.gradient(lambda t: penalty(x, t, upstream), gamma),
        oracle.gradient(lambda t: penalty(x, gamma, t), upstream),
    )
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(array(g), w, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("shape", "axis"), [((24, 8), 1), ((3, 5, 4, 6), 1)], ids=str)
def test_a_mask_is_cut_into_strips_with_its_input(shape, axis):
    x, upstream, gamma, beta = draw(shape, (axis,))
    rows = [n for i, n in enumerate(shape) if i != axis]
    mask = np.random.default_rng(1).random(rows) < 0.6
    x[~np.broadcast_to(np.expand_dims(mask, axis), shape)] = np.nan

    def kernel(x, gamma, beta, axes):
        return plain.normalize_batch(x, mask, gamma, beta, axes=axes, epsilon=EPSILON)

    def in_strips(*args):
        with dispatch.assuming(strips=True):
            return kernel(*args)

    want = step((kernel, "graph"), x, upstream, gamma, beta, (axis,))
    got = step((in_strips, "xla"), x, upstream, gamma, beta, (axis,))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", [(32, 64), (16, 8, 8, 16), (64, 32, 32, 32)], ids=str)
def test_xla_computes_nothing_anew_for_each_layer(shape):
    """The instructions of a chain grow with its length, not with its square.

    What several layers use, outputs and gradients, XLA would rather compute again in
    each, and in a chain all that comes before with it.
    """

    def instructions(depth):
        make = keras_bn.BatchNormalization
        forward, weights = bench.in_line(make, shape, length=depth)
        run = modes.with_gradients(forward, weights, "jit_compile")
        x = tf.zeros(shape)
        text = run.experimental_get_compiler_ir(x, x)(stage="optimized_hlo")
        return text.count(" = f32[")

    two, four, six = (instructions(depth) for depth in (2, 4, 6))
    assert six - four <= 1.1 * (four - two)


def test_fused_keeps_only_the_input_alive():
    """Of full size, the backward pass reads x and the upstream gradient alone."""
    x, upstream, gamma, beta = draw((4, 8, 8, 3), (3,))

    @tf.function
    def run(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = run_fused(x, gamma, beta, (3,))
        return tape.gradient(y, x, output_gradients=upstream)

    graph = run.get_concrete_function(tf.constant(x), tf.constant(upstream)).graph
    *_, backward = (op for op in graph.get_operations() if op.type == "StatelessIf")
    whole = [source(t) for t in backward.inputs if t.shape == x.shape]
    assert set(whole) == {source(t) for t in graph.inputs}


def source(tensor):
    """The op whose output a tensor is a copy of."""
    while tensor.op.type in ("Identity", "IdentityN"):
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor.op


@pytest.mark.parametrize(
    ("rows", "shift", "near"),
    [(1024, 1.8, True), (1024, 2.2, False), (4096, 3.8, True), (4100, 4.2, False)],
)
def test_one_pass_is_near_enough_up_to_some_standard_deviations(rows, shift, near):
    """What it says then is nearly exact; else it says that it is not."""
    x = np.random.default_rng(0).normal(size=(rows, 3))
    x = (x - x.mean(0)) / x.std(0)
    x[:, 1] += shift
    x = x.astype("float32")
    mean, variance, said = map(array, fused._moments_about_zero(tf.constant(x)))
    assert said == near
    _, want_mean, want_variance = oracle.moments(x, (1,))
    if near:
        np.testing.assert_allclose(mean, want_mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(variance, want_variance, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rows", [1024, 4097, 65551])
def test_parts_by_the_op_serve_any_number_of_rows(rows, dtype):
    """Without a cut, 65,551 rows in one column are off by 4e-6."""
    x = np.random.default_rng(0).normal(5.0, 1.0, (rows, 8)).astype(dtype)
    got = map(array, fused._moments_by_op(tf.constant(x), EPSILON))
    _, *want = oracle.moments(x, (1,))
    for mine, exact in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-6)


@pytest.mark.parametrize("rows", [64, 4096, None])
def test_a_known_number_of_rows_is_settled_while_tracing(rows):
    """Only where it is unknown does the op wait in the branches of a conditional."""

    @tf.function(input_signature=[tf.TensorSpec([rows, 4])])
    def run(x):
        return run_fused(x, None, None, (1,))[0]

    kinds = {op.type for op in run.get_concrete_function().graph.get_operations()}
    assert ("FusedBatchNormV3" in kinds) == (rows is not None)


@pytest.mark.parametrize("large", [True, False])
def test_a_large_mean_leaves_the_fused_op(monkeypatch, large):
    """And only then: at run time, in one and the same graph."""
    x, _, gamma, beta = draw((256, 4), (1,))
    if large:
        x[:, 2] += 100
    function = tf.function(lambda x: run_fused(x, gamma, beta, (1,))[0])
    plain_y = array(tf.function(lambda x: run_plain(x, gamma, beta, (1,))[0])(x))
    monkeypatch.setattr(fused, "LARGE_MEAN", np.inf)
    fused_y = array(tf.function(lambda x: run_fused(x, gamma, beta, (1,))[0])(x))
    assert (plain_y != fused_y).any()
    monkeypatch.undo()
    np.testing.assert_array_equal(array(function(x)), plain_y if large else fused_y)


def test_keras_reference_is_keras():
    x, upstream, gamma, beta = draw((16, 4), (1,))
    layer = keras.layers.BatchNormalization(epsilon=EPSILON)
    layer.build(x.shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    want = step((run_keras, "graph"), x, upstream, gamma, beta, (1,))["y"]
    np.testing.assert_array_equal(array(layer(x, training=True)), want)
