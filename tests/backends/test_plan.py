"""Which plan serves what: the table, what feeds it, and how often it is traced."""

import gc
import importlib
import weakref

import keras
import numpy as np
import pytest
from keras import ops
from support.backend import MODES, NAME, only, tf
from support.steps import Step, oracle_step, relative_error, set_parameters

import keras_bn
from keras_bn.backends import backend
from keras_bn.backends.plan import Plan, by_size, fused_fits
from keras_bn.layer import step

XLA = only("tensorflow", "its plans are others under XLA")
TRACES = only("tensorflow", "elsewhere a trace is of one size, or there is none")
SIZES = only("tensorflow", "elsewhere the kernel does not depend on the size")


def of_backends(tensorflow, torch, jax):
    """What is expected here."""
    return {"tensorflow": tensorflow, "torch": torch, "jax": jax}[NAME]


def module(name):
    return importlib.import_module(f"keras_bn.backends.{name}")


@pytest.mark.parametrize(
    ("dtype", "axes", "epsilon", "gpu", "fits"),
    [
        ("float32", (3,), 1e-3, False, True),
        ("float32", (1,), 1e-3, False, True),
        ("float32", (1, 2), 1e-3, False, False),
        ("float16", (3,), 1e-3, False, True),
        ("bfloat16", (3,), 1e-3, False, True),
        ("float64", (3,), 1e-3, False, False),
        ("float32", (3,), 0.0, False, True),
        ("float32", (3,), 1e-3, True, True),
        ("float32", (3,), 1e-6, True, False),
        ("float64", (3,), 1e-3, True, False),
    ],
    ids=str,
)
def test_where_the_fused_op_fits(dtype, axes, epsilon, gpu, fits):
    assert fused_fits(dtype, axes, epsilon, gpu) == fits


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((32, 64), "plain"),
        ((128, 256), "plain"),
        ((8, 7, 7, 64), "plain"),
        ((256, 1024), "fused"),
        ((8192, 256), "fused"),
        ((32, 7, 7, 512), "fused"),
        ((None, 64), "plain"),
        ((None, 256), "either"),
        ((None, 4096), "either"),
        ((None, None, 64), "either"),
        ((None, 50, 128), "fused"),
        ((None, 10, 64), "plain"),
        ((None, 7, 7, 64), "plain"),
        ((None, 7, 7, 512), "fused"),
        ((None, 56, 56, 64), "fused"),
        ((None, None, None, 64), "fused"),
        ((None, None, None, 8), "plain"),
        ((0, 56, 56, 64), "plain"),
    ],
    ids=str,
)
def test_sizes(shape, kernel):
    assert by_size(shape, channels=shape[-1]) == kernel


IMAGES = step.Settings((3,), 1e-3)


def planned(x, mask=None, **changes):
    return backend.make_plan(x, mask, IMAGES._replace(**changes))


def here(*values, **options):
    """The plan of an eager call; XLA compiles all that JAX runs."""
    return Plan(*values, **options, xla=NAME == "jax")


def test_what_a_plan_holds():
    x = ops.zeros((8, 32, 32, 32))
    usual = of_backends("fused", "fused", "closed")
    assert planned(x) == here(usual, (3,))
    several = of_backends("plain", "plain", "closed")
    assert planned(x, axes=(1, 2)) == here(several, (1, 2))
    assert planned(x, mask=True) == here("plain", (3,))
    assert planned(x, group_size=4) == here("plain", (3,), group_size=4)
    # Outside of replicas there is nobody to share with.
    assert planned(x, synchronized=True) == here(usual, (3,))


@pytest.mark.parametrize("rows", [0, 1, 2, 10_000])
def test_plans_of_few_and_many_rows(rows):
    few = {0: ("plain", "plain"), 1: ("plain", "closed")}.get(rows, ("fused", "closed"))
    kernel = of_backends("fused" if rows > 2 else "plain", *few)
    assert planned(ops.zeros((rows, 64)), axes=(1,)) == here(kernel, (1,))


@XLA
@pytest.mark.parametrize("large", [False, True])
def test_a_plan_for_xla(large):
    """Outputs are computed once where that costs little memory."""
    plans = []

    @tf.function(jit_compile=True, autograph=False)
    def run(x):
        plans.append(planned(x))
        return x

    run(tf.zeros((65, 32, 32, 64) if large else (8, 32, 32, 32)))
    assert plans == [Plan("plain", (3,), xla=True, once=not large)]


@only("tensorflow", "elsewhere a GPU has the same plans")
def test_a_plan_for_a_gpu(monkeypatch):
    """As if the machine had one on which everything runs."""
    monkeypatch.setattr(module("tensorflow.context"), "on_gpu", lambda: True)
    small = tf.zeros((2, 3, 3, 4))
    assert planned(small) == Plan("fused", (3,), gpu=True)
    assert planned(small, epsilon=1e-6) == Plan("plain", (3,), gpu=True)
    assert planned(small, mask=True) == Plan("plain", (3,), gpu=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "changes", "kernels"),
    [
        ((32, 64), "float32", {"axes": (1,)}, ("plain", "fused", "closed")),
        ((8, 32, 32, 32), "float32", {}, ("fused", "fused", "closed")),
        ((8, 32, 32, 32), "float32", {"axes": (1,)}, ("fused", "fused", "closed")),
        ((8, 32, 32, 32), "float32", {"axes": (1, 2)}, ("plain", "plain", "closed")),
        ((8, 32, 32, 32), "float32", {"group_size": 4}, ("plain",) * 3),
        ((8, 32, 32, 32), "float64", {}, ("plain", "fused", "closed")),
        ((8, 32, 32, 32), "float32", {"mask": True}, ("plain",) * 3),
    ],
    ids=str,
)
def test_the_table_of_kernels(shape, dtype, changes, kernels):
    plan = planned(ops.zeros(shape, dtype), **changes)
    assert plan.kernel == of_backends(*kernels)


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


@XLA
def test_what_was_traced_outside_of_xla_runs_inside():
    """XLA lowers the fused op to E[x²] − E[x]², which the shift keeps right."""
    shape = (64, 32, 32, 32)
    layer = keras_bn.BatchNormalization()
    layer.build(shape)
    traced = tf.function(lambda x: layer(x, training=True), autograph=False)
    outside = traced.get_concrete_function(tf.TensorSpec(shape))
    inside = tf.function(lambda x: outside(x), jit_compile=True, autograph=False)
    x = np.random.default_rng(0).normal(1e3, 1, shape).astype("float32")
    np.testing.assert_allclose(inside(x), outside(x), atol=1e-4)


BATCHES = range(1, 21)


@TRACES
def test_graph_traces_once():
    layer = keras_bn.BatchNormalization()
    layer.build((None, 5))

    @tf.function(input_signature=[tf.TensorSpec([None, 5])], autograph=False)
    def run(x):
        return layer(x, training=True)

    for n in BATCHES:
        run(tf.zeros([n, 5]))
    assert run.experimental_get_tracing_count() == 1


class Counting(keras_bn.BatchNormalization):
    """A layer that counts how often its Python code runs."""

    calls = 0

    def call(self, inputs, training=None, mask=None):
        self.calls += 1
        return super().call(inputs, training, mask)


def calls_of_fit(sizes):
    """How often the layer's Python code runs in an epoch of batches of these sizes."""
    layer = Counting()
    model = keras.Sequential([keras.Input([5]), layer, keras.layers.Dense(1)])
    model.compile(loss="mse")
    signature = (tf.TensorSpec([None, 5]), tf.TensorSpec([None, 1]))
    data = tf.data.Dataset.from_generator(
        lambda: ((np.ones([n, 5]), np.ones([n, 1])) for n in sizes),
        output_signature=signature,
    )
    model.fit(data, verbose=0, shuffle=False)
    return layer.calls


@TRACES
def test_fit_traces_no_more_for_many_sizes_than_for_a_few():
    assert calls_of_fit(BATCHES) == calls_of_fit([4, 5, 6])


@SIZES
@pytest.mark.parametrize("rows", [10, 3000])
def test_the_kernel_of_a_matrix_is_chosen_when_its_rows_are_there(rows):
    """In one and the same graph."""
    plans = [Plan(name, (1,)) for name in ("either", "plain", "fused")]
    signature = [tf.TensorSpec([None, 64])]

    def run(plan):
        def forward(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y, _ = backend.forward(x, None, None, None, epsilon=1e-3, plan=plan)
            return y, tape.gradient(y, x, tf.sin(x))

        return tf.function(forward, input_signature=signature, autograph=False)

    x = np.random.default_rng(0).normal(5, 1, (rows, 64)).astype("float32")
    either, plain, fused = (run(plan)(x) for plan in plans)
    want, other = (fused, plain) if rows * 64 >= 2**17 else (plain, fused)
    for got, right, wrong in zip(either, want, other, strict=True):
        np.testing.assert_allclose(got, right, atol=1e-6)
        assert (
            np.abs(np.subtract(got, right)).max()
            <= np.abs(np.subtract(got, wrong)).max()
        )


def test_one_trace_serves_all_sizes_of_a_plan():
    traces = []

    @backend.compiled
    def function(x, *, settings, plan):
        traces.append(plan.kernel)
        return x

    settings = step.Settings((1,), 1e-3)
    for rows in (8, 16, 100_000, 200_000):
        x = ops.zeros([rows, 4])
        function(x, settings=settings, plan=backend.make_plan(x, None, settings))
    assert traces == of_backends(["plain", "fused"], ["fused"] * 4, ["closed"] * 4)


@TRACES
@pytest.mark.parametrize("rows", [4, 50_000])
def test_traces_are_bounded_and_let_go(rows, monkeypatch):
    from tensorflow.python.framework.ops import gradient_registry

    monkeypatch.setattr(module("tensorflow.compiled"), "TRACES", 3)
    graphs = []

    @backend.compiled
    def function(x, *, settings, plan):
        graphs.append(weakref.ref(tf.compat.v1.get_default_graph()))
        y, _ = backend.forward(x, None, None, None, epsilon=1e-3, plan=plan)
        return y

    settings = step.Settings((1,), 1e-3)

    def call(shape):
        x = tf.random.normal(shape)
        with tf.GradientTape() as tape:
            tape.watch(x)
            plan = backend.make_plan(x, None, settings)
            y = tf.reduce_sum(function(x, settings=settings, plan=plan) ** 3)
        assert np.all(np.isfinite(tape.gradient(y, x)))

    def gradients():
        names = gradient_registry.list()
        return sum(name.startswith("CustomGradient") for name in names)

    for channels in range(3, 11):
        call([rows, channels])
    for more in range(3):
        call([rows + more, 10])
    assert len(graphs) == 8, "one trace for all sizes but those of the channels"
    gc.collect()
    # The last call's tape may still hold what it was traced with.
    assert sum(graph() is not None for graph in graphs) <= 4
    before = gradients()
    for channels in range(11, 17):
        call([rows, channels])
    gc.collect()
    assert gradients() <= before + 2
    call([rows, 3])
    assert len(graphs) == 15
