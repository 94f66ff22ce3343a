"""Every kernel against the oracle, and none less accurate than it may be."""

import functools

import keras
import numpy as np
import oracle
import pytest
from support import backend as support
from support.errors import assert_not_worse, cores, summed
from support.marks import mostly_slow, mostly_slow_cases, slow
from support.steps import array, in_mode, relative_error

import keras_bn
from keras_bn import verify
from keras_bn.backends import backend, modes
from keras_bn.backends.plan import Plan

tf = support.tensorflow("its kernels, one by one")


EPSILON = 1e-3
NAMES = ("y", "mean", "variance", "dx", "d_gamma", "d_beta")
# What Keras's error counts as at least: some 17 roundings, all but exact.
FLOOR = 1e-6


def run_kernel(x, gamma, beta, axes, mask=None, **plan):
    how = Plan(axes=axes, **plan)
    return backend.forward(x, mask, gamma, beta, epsilon=EPSILON, plan=how)


run_plain = functools.partial(run_kernel, kernel="plain")
run_fused = functools.partial(run_kernel, kernel="fused")
run_either = functools.partial(run_kernel, kernel="either")
run_once = functools.partial(run_kernel, kernel="plain", once=True)


def run_keras(x, gamma, beta, axes):
    """Keras's arithmetic, on the moments that its layer takes."""
    rows = [a for a in range(len(x.shape)) if a not in axes]
    wide = tf.cast(x, tf.float32)
    mean, variance = tf.nn.moments(wide, rows, keepdims=True)
    gamma, beta = (tf.reshape(v, mean.shape) for v in (gamma, beta))
    y = tf.nn.batch_normalization(wide, mean, variance, beta, gamma, EPSILON)
    moments = (tf.reshape(m, [-1]) for m in (mean, variance))
    return tf.cast(y, x.dtype), (None, *moments)


WAYS = {
    "plain": (run_plain, "graph"),
    "plain under XLA": (run_plain, "xla"),
    "plain under XLA, once": (run_once, "xla"),
    "fused": (run_fused, "graph"),
    "either": (run_either, "graph"),
}
ONE_AXIS = ("fused", "either")
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
# Those of the default run.
USUAL = [((6, 5), (1,)), ((3, 6, 4, 2), (1,)), ((3, 4, 2, 6), (2, 3))]


def draw(shape, axes, mean=0.5, seed=0):
    rng = np.random.default_rng(seed)
    along = [shape[a] for a in axes]
    x = rng.normal(mean, 1, shape).astype("float32")
    upstream = rng.normal(size=shape).astype("float32")
    gamma = rng.normal(1, 0.3, along).astype("float32")
    return x, upstream, gamma, rng.normal(size=along).astype("float32")


@functools.lru_cache(maxsize=16)  # tests that differ in the numbers alone share it
def stepper(way, axes, shape=None):
    """A function that gives output, moments and gradients by one kernel in one mode.

    With a shape, sizes other than those of the channels are unknown while tracing.
    """
    kernel, mode = way

    def run(x, upstream, gamma, beta):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, (_, mean, variance) = kernel(x, gamma, beta, axes)
        grads = tape.gradient(y, [x, gamma, beta], output_gradients=upstream)
        return y, mean, variance, *grads

    function = in_mode(run, mode)
    if shape is not None:
        sizes = [n if a in axes else None for a, n in enumerate(shape)]
        per_channel = tf.TensorSpec([shape[a] for a in axes])
        spec = [tf.TensorSpec(sizes)] * 2 + [per_channel] * 2
        function = tf.function(run, input_signature=spec, jit_compile=mode == "xla")

    def call(*data):
        results = function(*(tf.constant(t) for t in data))
        return dict(zip(NAMES, map(array, results), strict=True))

    return call


def step(way, x, upstream, gamma, beta, axes, unknown_sizes=False):
    """Output, moments and gradients by one kernel in one mode."""
    return stepper(way, axes, x.shape if unknown_sizes else None)(
        x, upstream, gamma, beta
    )


def oracle_step(x, upstream, gamma, beta, axes):
    _, mean, variance = oracle.moments(x, axes)
    dx, d_gamma, d_beta = oracle.backward(x, gamma, axes, EPSILON, upstream)
    y = oracle.forward(x, gamma, beta, axes, EPSILON)
    return dict(zip(NAMES, (y, mean, variance, dx, d_gamma, d_beta), strict=True))


@pytest.mark.parametrize("unknown_sizes", [False, True], ids=["static", "unknown"])
@pytest.mark.parametrize(
    ("way", "shape", "axes"),
    mostly_slow_cases(
        [
            (way, shape, axes)
            for way in WAYS
            for shape, axes in SHAPES
            if way not in ONE_AXIS or len(axes) == 1
        ],
        [(way, shape, axes) for way in WAYS for shape, axes in USUAL],
    ),
    ids=str,
)
def test_against_the_oracle(way, shape, axes, unknown_sizes):
    data = draw(shape, axes)
    got = step(WAYS[way], *data, axes, unknown_sizes)
    want = oracle_step(*data, axes)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


@functools.lru_cache(maxsize=3)  # the draws of a case, which every way computes
def drawn(shape, axes, mean, seed):
    """Data, and what the oracle makes of it."""
    data = draw(shape, axes, mean, seed)
    return data, oracle_step(*data, axes)


def errors_of(run, shape, axes, mean, seed):
    """By name, the error of what a `stepper` gives."""
    data, want = drawn(shape, axes, mean, seed)
    got, errors = run(*data), {}
    for name, value in want.items():
        # A mean near 0 is as good as its error in standard deviations.
        unit = min(np.max(np.abs(value)), 1.0) if name == "mean" else 1.0
        errors[name] = unit * relative_error(got[name], value)
    return errors


@functools.cache
def errors_of_keras(mode, shape, axes, mean, seed):
    return errors_of(stepper((run_keras, mode), axes), shape, axes, mean, seed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mean", mostly_slow([0.0, 7.0, 1e2, 3e3, 3e4], [7.0, 3e4]))
@pytest.mark.parametrize(
    "shape",
    mostly_slow(
        [(64, 8), (8, 16, 16, 4), (1569, 32), (32768, 16), (200_704, 16)],
        [(64, 8), (8, 16, 16, 4), (32768, 16)],
    ),
    ids=str,
)
def test_error_is_within_the_budget(shape, mean, way):
    """Three times Keras's where that is below 1e-3, and never above 1e-3."""
    axes = (len(shape) - 1,)
    ours = stepper(WAYS[way], axes)
    errors = {name: [] for name in NAMES}
    for seed in range(3):
        case = shape, axes, mean, seed
        of_keras = errors_of_keras("xla" if "XLA" in way else "graph", *case)
        for name, error in errors_of(ours, *case).items():
            errors[name].append((error, of_keras[name]))
    least = FLOOR if cores() > 1 else summed(FLOOR, shape[0])
    assert_not_worse(errors, least=least, most=1e-3)


@pytest.mark.parametrize("value", mostly_slow([1.0, 1e4 + 0.1, 1e8], [1e8]))
@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("way", WAYS)
def test_constant_columns_give_beta(way, rows, value):
    x, upstream, gamma, beta = draw((rows, 3), (1,))
    x[:, 1] = value
    got = step(WAYS[way], x, upstream, gamma, beta, (1,))
    np.testing.assert_allclose(got["y"][:, 1], beta[1], rtol=0, atol=1e-3)
    assert got["variance"][1] < 1e-9


@pytest.mark.parametrize("bad", [np.nan, slow(np.inf)])
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
@pytest.mark.parametrize("way", ["plain", "fused", "either"])
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
    errors = {
        name: [relative_error(r[name], value) for r in (got, reference)]
        for name, value in want.items()
    }
    assert_not_worse(errors, least=FLOOR)


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


@pytest.mark.parametrize("bad", [slow(0.0), np.nan, slow(np.inf), slow(1e30)])
@pytest.mark.parametrize("shape", [(64, 5), (2048, 70), (4, 8, 8, 5)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_first_samples_may_be_anything(way, shape, bad):
    """The shift is taken from them: constant, or lost in one channel alone."""
    axes = (len(shape) - 1,)
    data = draw(shape, axes)
    data[0][:16, ..., 2] = bad
    if bad == 0.0:
        data[0][:16] = 0.0
    got, want = step(WAYS[way], *data, axes), oracle_step(*data, axes)
    for name, value in want.items():
        kept = [c for c in range(shape[-1]) if c != 2 or bad == 0.0]
        np.testing.assert_allclose(
            got[name][..., kept], value[..., kept], rtol=1e-4, atol=2e-5, err_msg=name
        )
    if bad in (np.inf, np.nan):
        assert not np.isfinite(got["mean"][2] + got["variance"][2])


@pytest.mark.parametrize("way", WAYS)
def test_rows_in_order(way):
    """The first rows say least of the rest: a shift three deviations from the mean."""
    data = draw((4096, 3), (1,), mean=100)
    data[0].sort(axis=0)
    got, want = step(WAYS[way], *data, (1,)), oracle_step(*data, (1,))
    for name, value in want.items():
        assert relative_error(got[name], value) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 64), (16, 8, 8, 16), (64, 32, 32, 32)], ids=str)
def test_xla_computes_nothing_anew_for_each_layer(shape):
    """The instructions of a chain grow with its length, not with its square.

    What several layers use, outputs and gradients, XLA would rather compute again in
    each, and in a chain all that comes before with it.
    """

    def instructions(depth):
        make = keras_bn.BatchNormalization
        forward, variables = verify.in_line(make, shape, length=depth)
        run = modes.with_gradients(forward, variables, "xla")
        x = tf.zeros(shape)
        text = run.experimental_get_compiler_ir(x, x)(stage="optimized_hlo")
        return text.count(" = f32[")

    two, four, six = (instructions(depth) for depth in (2, 4, 6))
    assert six - four <= 1.1 * (four - two)


def test_fused_keeps_one_tensor_of_full_size():
    """The backward pass reads the shifted input and the upstream gradient alone."""
    x, upstream, gamma, beta = draw((4, 8, 8, 3), (3,))

    @tf.function(autograph=False)
    def run(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = run_fused(x, gamma, beta, (3,))
        return tape.gradient(y, x, output_gradients=upstream)

    graph = run.get_concrete_function(tf.constant(x), tf.constant(upstream)).graph
    ops = graph.get_operations()
    (backward,) = (op for op in ops if op.type == "FusedBatchNormGradV3")
    read = [source(t) for t in backward.inputs if t.shape == x.shape]
    assert [op.type for op in read] == ["Placeholder", "Sub"]


def source(tensor):
    """The op whose output a tensor is a copy of."""
    while tensor.op.type in ("Identity", "IdentityN"):
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor.op


def test_the_fused_kernel_has_no_conditional():
    """It is what makes a model of many layers quick to start."""

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 64])], autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = run_fused(x, None, None, (3,))
        return tape.gradient(y, x)

    graph = run.get_concrete_function().graph
    kinds = {op.type for op in graph.get_operations()}
    assert {"FusedBatchNormV3", "FusedBatchNormGradV3"} <= kinds
    assert not {"If", "StatelessIf", "While", "EuclideanNorm"} & kinds


def test_keras_reference_is_keras():
    x, upstream, gamma, beta = draw((16, 4), (1,))
    layer = keras.layers.BatchNormalization(epsilon=EPSILON)
    layer.build(x.shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    want = step((run_keras, "graph"), x, upstream, gamma, beta, (1,))["y"]
    np.testing.assert_array_equal(array(layer(x, training=True)), want)
