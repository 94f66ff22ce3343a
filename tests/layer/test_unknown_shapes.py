"""A built layer knows its channels, also where a signature or a pipeline does not."""

import keras
import numpy as np
import pytest
from support import backend as support
from support.steps import MODES, Step, oracle_step, relative_error, set_parameters

import keras_bn
from keras_bn.backends import backend
from keras_bn.backends.plan import Plan
from keras_bn.layer import step

tf = support.tensorflow("sizes are always known elsewhere")

# Shape, channel axes, and the kernel that serves it with only the channels known.
CASES = [
    ((12, 5), -1, "plain"),
    ((12, 5), 0, "plain"),
    ((12, 300), -1, "either"),
    ((4, 3, 6), -1, "either"),
    ((4, 6, 3), 1, "either"),
    ((4, 3, 3, 6), -1, "plain"),
    ((4, 3, 3, 32), -1, "fused"),
    ((4, 32, 3, 3), 1, "fused"),
    ((4, 2, 3, 2, 6), -1, "fused"),
    ((4, 6, 2, 3, 2), 1, "fused"),
    ((4, 3, 2, 5), [1, 3], "plain"),
]


def unknown(rank):
    return tf.TensorSpec([None] * rank, tf.float32)


def step_of(layer, rank, mode, mask=None):
    """A training step whose signature tells nothing but the rank."""
    signature = [unknown(rank)] * 2
    if mask is not None:
        signature.append(tf.TensorSpec([None] * mask.ndim, tf.bool))

    def run(x, upstream, *masks):
        assert x.shape.as_list() == [None] * rank
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=masks[0] if masks else None)
        return y, tape.gradient(y, x, upstream)

    run = tf.function(run, signature, autograph=False, jit_compile=mode == "xla")
    return run if mask is None else lambda x, g: run(x, g, mask)


def compare(shape, axis, mode="graph"):
    rng = np.random.default_rng(0)
    layer = keras_bn.BatchNormalization(axis=axis)
    layer.build(shape)
    axes = tuple(a % len(shape) for a in (axis if isinstance(axis, list) else [axis]))
    sizes = [shape[a] for a in axes]
    gamma, beta = rng.normal(1, 0.3, sizes), rng.normal(size=sizes)
    set_parameters(layer, gamma, beta)
    x = rng.normal(1, 2, shape).astype("float32")
    upstream = rng.normal(size=shape).astype("float32")
    y, dx = step_of(layer, len(shape), mode)(x, upstream)
    want = oracle_step(layer, x, upstream, axes, gamma, beta)
    assert relative_error(y.numpy(), want["y"]) < 1e-5
    assert relative_error(dx.numpy(), want["dx"]) < 1e-5
    for name in ("moving_mean", "moving_variance"):
        assert relative_error(getattr(layer, name).numpy(), want[name]) < 1e-5


@pytest.mark.parametrize(("shape", "axis", "kernel"), CASES, ids=str)
def test_a_step_is_right_with_nothing_known_but_the_rank(shape, axis, kernel):
    compare(shape, axis)
    axes = tuple(sorted(a % len(shape) for a in np.atleast_1d(axis).tolist()))
    spec = [size if i in axes else None for i, size in enumerate(shape)]
    plans = []

    @tf.function(input_signature=[tf.TensorSpec(spec)], autograph=False)
    def run(x):
        plans.append(backend.make_plan(x, None, step.Settings(axes, 1e-3)))
        return x

    run.get_concrete_function()
    assert plans == [Plan(kernel, axes)]


@pytest.mark.parametrize(("shape", "axis"), [((12, 5), -1), ((4, 32, 3, 3), 1)])
def test_under_xla(shape, axis):
    with tf.device("CPU:0"):
        compare(shape, axis, mode="xla")


@pytest.mark.parametrize(
    ("shape", "axis", "masked"),
    [
        ((12, 5), -1, (12,)),
        ((4, 3, 6), -1, (4, 3)),
        ((4, 6, 3), 1, (4, 6)),
        ((4, 2, 3, 6), -1, (4, 2, 3)),
    ],
)
def test_a_mask_counts_as_where_all_is_known(shape, axis, masked):
    rng = np.random.default_rng(1)
    mask = rng.uniform(size=masked) < 0.7
    x, upstream = (rng.normal(1, 2, shape).astype("float32") for _ in range(2))
    layers = [keras_bn.BatchNormalization(axis=axis) for _ in range(2)]
    for layer in layers:
        layer.build(shape)
    got = step_of(layers[0], len(shape), "graph", mask)(x, upstream)
    known = Step(layers[1], "graph", mask)(x, upstream)
    for value, name in zip(got, ("y", "dx"), strict=True):
        assert relative_error(value.numpy(), known[name]) < 1e-6
    for name in ("moving_mean", "moving_variance"):
        assert relative_error(getattr(layers[0], name).numpy(), known[name]) < 1e-6


@pytest.mark.parametrize("mode", MODES[1:])
def test_inference(mode):
    layer = keras_bn.BatchNormalization(axis=1)
    layer.build((None, 3, None, None))
    layer.moving_mean.assign([1.0, 2.0, 3.0])
    run = tf.function(
        lambda x: layer(x, training=False), [unknown(4)], jit_compile=mode == "xla"
    )
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype("float32")
    np.testing.assert_allclose(run(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"virtual_batch_size": 4},
        {"renorm": True},
        {"momentum": None},
        {"synchronized": True},
    ],
    ids=str,
)
def test_options(options):
    x = np.random.default_rng(0).normal(3, 2, (12, 5)).astype("float32")
    layers = [keras_bn.BatchNormalization(**options) for _ in range(2)]
    for layer in layers:
        layer.build((None, 5))
    known, not_known = (
        tf.function(lambda x, la=layer: la(x, training=True), [spec], autograph=False)
        for layer, spec in zip(
            layers, [tf.TensorSpec([None, 5]), unknown(2)], strict=True
        )
    )
    np.testing.assert_allclose(not_known(x), known(x), rtol=1e-6, atol=1e-6)
    for a, b in zip(*(layer.variables for layer in layers), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)


def test_a_tensor_says_whether_it_is_training():
    layer = keras_bn.BatchNormalization()
    layer.build((None, 5))
    run = tf.function(
        lambda x, training: layer(x, training=training),
        [unknown(2), tf.TensorSpec([], tf.bool)],
    )
    x = np.random.default_rng(0).normal(3, 2, (12, 5)).astype("float32")
    trained = run(x, True).numpy()
    np.testing.assert_allclose(trained.mean(0), 0, atol=1e-6)
    assert not np.allclose(run(x, False), trained)


def fitted(bn, rank):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    shape = (6, 6, 3) if rank == 4 else (5,)
    channels = shape[-1]
    data = rng.normal(2, 3, (32, *shape)).astype("float32")
    labels = rng.normal(size=(32, 1)).astype("float32")

    def batches():
        for i in range(0, 32, 8):
            yield data[i : i + 8], labels[i : i + 8]

    signature = (unknown(rank), tf.TensorSpec([None, 1]))
    pipeline = tf.data.Dataset.from_generator(batches, output_signature=signature)
    inputs = keras.Input((*([None] * (len(shape) - 1)), channels))
    if rank == 4:
        x = bn(name="bn")(keras.layers.Conv2D(4, 3)(inputs))
        x = keras.layers.GlobalAveragePooling2D()(x)
    else:
        x = bn(name="bn")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    history = model.fit(pipeline.repeat(2), verbose=0).history["loss"]
    return history, model.get_layer("bn").moving_mean.numpy()


@pytest.mark.parametrize("rank", [2, 4])
def test_fit_on_a_pipeline_of_unknown_shapes_is_as_with_keras(rank):
    theirs = fitted(keras.layers.BatchNormalization, rank)
    ours = fitted(keras_bn.BatchNormalization, rank)
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4)


def test_other_channels_at_run_time_are_refused():
    layer = keras_bn.BatchNormalization()
    layer.build((None, 5))
    run = tf.function(lambda x: layer(x, training=True), [unknown(2)])
    before = layer.moving_mean.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(np.ones((4, 6), "float32"))
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)


@pytest.mark.parametrize(
    "bn", [keras.layers.BatchNormalization, keras_bn.BatchNormalization]
)
def test_an_unknown_rank_is_refused_as_by_keras(bn):
    layer = bn()
    layer.build((None, 5))
    with pytest.raises(ValueError, match=r"unknown TensorShape|unknown rank"):
        tf.function(layer).get_concrete_function(tf.TensorSpec(None))
