"""The options: renorm as Keras has it, and those that go beyond Keras."""

import inspect
import itertools
import re

import keras
import numpy as np
import oracle
import pytest
from support import backend
from support.backend import COMPILED, KERAS_IS_A_JUDGE, tensor
from support.cases import groups
from support.marks import mostly_slow
from support.steps import MODES, Step, array, in_mode, relative_error, set_parameters

import keras_bn
from keras_bn.layer import moving, renorm


def batches(count, shape=(16, 3), seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield rng.normal(1 + 0.1 * i, 1 + 0.05 * i, shape).astype(dtype)


def state(layer):
    return {w.name: array(w.value) for w in layer.non_trainable_variables}


def name_of(arguments):
    """A test's id, the same in every process (a schedule's own name is not)."""
    if not isinstance(arguments, dict):
        return str(arguments)
    return "-".join(
        f"{k}={'ramp' if isinstance(v, dict) else v}" for k, v in arguments.items() if v
    )


# Renormalization

beside_keras = pytest.mark.skipif(
    "renorm" not in inspect.signature(keras.layers.BatchNormalization).parameters,
    reason=f"Keras {keras.__version__} has no renorm of its own",
)


CLIPPINGS = [
    None,
    {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0},
    {"rmax": 1.1},
    {"dmax": 0.1, "rmin": 0.9},
]


@beside_keras
@pytest.mark.parametrize("clipping", mostly_slow(CLIPPINGS, CLIPPINGS[1:2]), ids=str)
@pytest.mark.parametrize(
    ("mode", "scale", "center"),
    [
        *((mode, True, True) for mode in MODES),
        (COMPILED, False, True),
        (COMPILED, True, False),
        (COMPILED, False, False),
    ],
)
def test_renorm_is_keras(clipping, mode, scale, center):
    arguments = {"renorm": True, "renorm_clipping": clipping, "renorm_momentum": 0.9}
    arguments |= {"momentum": 0.95, "scale": scale, "center": center}
    layers = [
        cls(dtype="float64", **arguments)
        for cls in (keras.layers.BatchNormalization, keras_bn.BatchNormalization)
    ]
    for layer in layers:
        layer.build((None, 3))
        set_parameters(layer, [0.5, 1.5, 2.0], [0.1, -0.2, 0.3])
    theirs, ours = layers
    assert [w.path.split("/")[-1] for w in ours.weights] == [
        w.path.split("/")[-1] for w in theirs.weights
    ]
    upstream = tensor(np.random.default_rng(1).normal(size=(16, 3)))

    def runner(layer):
        return backend.training_step(
            lambda x: layer(x, training=True), layer.variables, mode
        )

    runs = [runner(layer) for layer in layers]
    # Elsewhere Keras computes in float32.
    slack = 1 if KERAS_IS_A_JUDGE else 1e5
    for x in batches(20):
        theirs_now, ours_now = (run(tensor(x), upstream) for run in runs)
        got, want = ([y, *gradients] for y, gradients in (ours_now, theirs_now))
        for a, b in zip(want, got, strict=True):
            np.testing.assert_allclose(
                array(b), array(a), rtol=1e-9 * slack, atol=1e-11 * slack
            )
        for name, value in state(theirs).items():
            np.testing.assert_allclose(state(ours)[name], value, rtol=1e-11 * slack)
    np.testing.assert_allclose(array(ours(x)), array(theirs(x)), rtol=1e-10 * slack)


@beside_keras
def test_renorm_weights_are_interchangeable(tmp_path):
    x = next(batches(1, dtype="float32"))

    def model(cls):
        return keras.Sequential([keras.Input((3,)), cls(renorm=True, name="bn")])

    ours, theirs = (
        model(cls)
        for cls in (keras_bn.BatchNormalization, keras.layers.BatchNormalization)
    )
    theirs(x, training=True)
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours.load_weights(tmp_path / "theirs.weights.h5")
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(array(a), array(b))
    ours(x, training=True)
    ours.save_weights(tmp_path / "ours.weights.h5")
    theirs.load_weights(tmp_path / "ours.weights.h5")
    np.testing.assert_allclose(array(ours(x)), array(theirs(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 3), (4, 5, 5, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
def test_with_the_ramp_the_first_step_is_plain_to_the_bit(shape, dtype):
    plain = keras_bn.BatchNormalization(dtype=dtype)
    ramped = keras_bn.BatchNormalization(
        dtype=dtype, renorm=True, renorm_clipping=keras_bn.renorm_ramp()
    )
    upstream = np.random.default_rng(1).normal(size=shape)
    x = next(batches(1, shape))
    for layer in (plain, ramped):
        layer.build(shape)
        set_parameters(layer, [0.5, 1.5, 2.0], [0.1, -0.2, 0.3])
    results = [Step(layer)(x, upstream) for layer in (plain, ramped)]
    for name in ("y", "dx", "d_gamma", "d_beta", "moving_mean"):
        np.testing.assert_array_equal(results[1][name], results[0][name], name)


def test_the_papers_ramp():
    ramp = keras_bn.renorm_ramp()
    counts = (0, 5_000, 15_000, 22_500, 25_000, 40_000, 10**9)
    rmax = [float(ramp["rmax"](count)) for count in counts]
    np.testing.assert_allclose(rmax, [1, 1, 1 + 4 / 7, 2, 1 + 8 / 7, 3, 3], rtol=1e-6)
    dmax = [float(ramp["dmax"](count)) for count in counts]
    np.testing.assert_allclose(dmax, [0, 0, 2.5, 4.375, 5, 5, 5], rtol=1e-6)
    np.testing.assert_allclose(
        [float(ramp["rmin"](count)) for count in counts], 1 / np.array(rmax), rtol=1e-6
    )
    short = keras_bn.renorm_ramp(rmax=2.0, dmax=1.0, scale=0.001)
    assert float(short["rmax"](40)) == 2.0
    assert float(short["dmax"](15)) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rmax": 0.5}, "`rmax` must be 1 or greater. Received: rmax=0.5"),
        ({"dmax": -1}, "`dmax` must be 0 or greater. Received: dmax=-1"),
        ({"scale": 0}, "`scale` must be greater than 0. Received: scale=0"),
        (
            {"begin": 50_000},
            "`begin` and `end` must be update counts with 0 <= begin <= end. "
            "Received: begin=50000, end=40000",
        ),
    ],
)
def test_bad_ramps(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        keras_bn.renorm_ramp(**arguments)


def ramped_model():
    keras.utils.set_random_seed(0)
    clipping = keras_bn.renorm_ramp(scale=0.001)  # moves between updates 5 and 40
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras_bn.BatchNormalization(
                renorm=True, renorm_clipping=clipping, renorm_momentum=0.8
            ),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def test_resuming_in_the_middle_of_the_ramp_is_not_stopping(tmp_path):
    data = list(batches(24, dtype="float32"))
    whole, first = ramped_model(), ramped_model()
    for x in data:
        whole.train_on_batch(x, x[:, :1])
    for x in data[:12]:
        first.train_on_batch(x, x[:, :1])
    first.save(tmp_path / "model.keras")
    second = keras.saving.load_model(tmp_path / "model.keras")
    for x in data[12:]:
        second.train_on_batch(x, x[:, :1])
    for a, b in zip(second.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(array(a), array(b))


def test_no_retrace_while_the_ramp_moves():
    layer = ramped_model().layers[0]
    traces = []

    def run(x):
        traces.append(None)
        return layer(x, training=True)

    run = in_mode(run, COMPILED, layer.variables)
    x = next(batches(1, dtype="float32"))
    outputs = [array(run(tensor(x if count < 44 else x + 1))) for count in range(45)]
    assert len(traces) == (45 if COMPILED == "eager" else 1)
    assert np.abs(np.mean(outputs[0])) < 1e-6
    assert np.mean(outputs[44]) > 0.1  # d has room now: the shift shows
    assert int(layer.updates[0, 0]) == 45


def test_any_schedule_of_keras_bounds_the_correction():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.0, 10.0])
    layer = keras_bn.BatchNormalization(
        renorm=True, renorm_clipping={"rmin": 1.0, "rmax": 1.0, "dmax": schedule}
    )
    means = [array(layer(x, training=True)).mean() for x in batches(5, dtype="float32")]
    np.testing.assert_allclose(means[:3], 0, atol=1e-6)  # updates 0, 1 and 2
    assert min(means[3:]) > 0.1


# The moving statistics


def test_unbiased_follows_pytorch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm1d(3, momentum=0.1, eps=1e-5)
    ours = keras_bn.BatchNormalization(unbiased=True, momentum=0.9, epsilon=1e-5)
    for x in batches(100, (8, 3), dtype="float32"):
        y = theirs(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(array(ours(x, training=True)), array(y), atol=2e-6)
    np.testing.assert_allclose(
        ours.moving_mean.numpy(), theirs.running_mean.numpy(), rtol=1e-6
    )
    np.testing.assert_allclose(
        ours.moving_variance.numpy(), theirs.running_var.numpy(), rtol=1e-6
    )


def test_the_plain_mean_follows_pytorch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm1d(3, momentum=None)
    ours = keras_bn.BatchNormalization(unbiased=True, momentum=None)
    for x in batches(20, (8, 3), dtype="float32"):
        theirs(torch.tensor(x))
        ours(x, training=True)
    np.testing.assert_allclose(
        ours.moving_mean.numpy(), theirs.running_mean.numpy(), rtol=1e-5
    )
    np.testing.assert_allclose(
        ours.moving_variance.numpy(), theirs.running_var.numpy(), rtol=1e-5
    )


@pytest.mark.parametrize("masked", [False, True])
def test_unbiased_uses_the_count_of_the_mask(masked):
    x = next(batches(1, (6, 4, 3)))
    mask = np.random.default_rng(1).random((6, 4)) < (0.5 if masked else 2)
    layer = keras_bn.BatchNormalization(unbiased=True, momentum=0.0, dtype="float64")
    y = layer(x, training=True, mask=mask)
    np.testing.assert_allclose(
        layer.moving_variance, x[mask].var(0, ddof=1), rtol=1e-12
    )
    one = np.ones(3)
    want = oracle.forward(x, one, 0 * one, (2,), layer.epsilon, mask)
    np.testing.assert_allclose(array(y), array(want), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("debias", [False, True])
def test_a_count_of_one_leaves_the_variance_alone(debias):
    layer = keras_bn.BatchNormalization(unbiased=True, debias=debias, momentum=0.5)
    layer(np.array([[4.0, 6.0]], "float32"), training=True)
    np.testing.assert_array_equal(layer.moving_variance.numpy(), [1, 1])
    assert layer.moving_mean.numpy().all()
    if debias:
        layer(np.array([[1.0, 2.0], [3.0, 8.0]], "float32"), training=True)
        np.testing.assert_allclose(layer.moving_variance.numpy(), [2, 18], rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.999999, 1.0, None])
def test_debias_is_the_weighted_mean_of_the_batches(momentum):
    layer = keras_bn.BatchNormalization(momentum=momentum, debias=True, dtype="float64")
    layer.build((None, 3))
    layer.set_weights(
        [np.ones(3), np.zeros(3), np.full(3, 7.0), np.full(3, 9.0), np.zeros((2, 3))]
    )
    seen = []
    for t, x in enumerate(batches(30), 1):
        layer(x, training=True)
        seen.append(x)
        weights = (1.0 if momentum is None else momentum) ** np.arange(t - 1, -1, -1.0)
        for name, statistic in (("mean", np.mean), ("variance", np.var)):
            want = np.average([statistic(s, axis=0) for s in seen], 0, weights)
            got = array(getattr(layer, f"moving_{name}"))
            np.testing.assert_allclose(got, array(want), rtol=1e-9 if t > 1 else 1e-14)
    np.testing.assert_array_equal(layer.updates, np.full((2, 3), 30))


def test_debias_counts_each_channel_for_itself():
    layer = keras_bn.BatchNormalization(momentum=0.9, debias=True)
    bad = np.array([[1, np.nan], [3, 1]], "float32")
    layer(bad, training=True)
    np.testing.assert_array_equal(layer.updates, [[1, 0], [1, 0]])
    layer(np.array([[1, 2], [3, 6]], "float32"), training=True)
    np.testing.assert_allclose(layer.moving_mean.numpy(), [2, 4], rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance.numpy(), [1, 4], rtol=1e-6)


def test_evaluation_is_right_after_one_step_with_debias():
    x = next(batches(1, dtype="float32"))
    layer = keras_bn.BatchNormalization(debias=True)
    y = layer(x, training=True)
    np.testing.assert_allclose(array(layer(x)), array(y), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        ({}, 4),
        ({"unbiased": True}, 4),
        ({"virtual_batch_size": 4}, 4),
        ({"freeze_statistics": True}, 4),
        ({"debias": True}, 5),
        ({"momentum": None}, 5),
        ({"renorm": True}, 7),
        ({"renorm": True, "renorm_clipping": keras_bn.renorm_ramp()}, 8),
        ({"renorm": True, "debias": True}, 8),
    ],
    ids=name_of,
)
def test_a_weight_more_only_where_an_option_needs_one(arguments, weights):
    layer = keras_bn.BatchNormalization(**arguments)
    layer.build((None, 3))
    assert len(layer.weights) == weights


def test_freeze_statistics():
    """Inference statistics in training; gamma and beta train; a live switch."""
    x = next(batches(1))
    layer = keras_bn.BatchNormalization(freeze_statistics=True, dtype="float64")
    layer.build((None, 3))
    layer.moving_mean.assign([1.0, 2.0, 3.0])
    before = state(layer)
    upstream = np.random.default_rng(1).normal(size=x.shape)
    step = backend.training_step(
        lambda x: layer(x, training=True), layer.variables, "eager"
    )
    y, (dx, d_gamma, d_beta) = step(tensor(x), tensor(upstream))
    np.testing.assert_array_equal(array(y), array(layer(x, training=False)))
    normalized = (x - before["moving_mean"]) / np.sqrt(1 + layer.epsilon)
    np.testing.assert_allclose(
        array(d_gamma), (upstream * normalized).sum(0), rtol=1e-12
    )
    np.testing.assert_allclose(array(d_beta), upstream.sum(0), rtol=1e-12)
    np.testing.assert_allclose(dx, upstream / np.sqrt(1 + layer.epsilon), rtol=1e-12)
    for name, value in state(layer).items():
        np.testing.assert_array_equal(value, before[name])
    layer.freeze_statistics = False
    layer(x, training=True)
    assert (state(layer)["moving_mean"] != before["moving_mean"]).all()


# Ghost batches


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", mostly_slow([1, 3, 4, 7, 8, 11, 16], [1, 7]))
@pytest.mark.parametrize(
    ("rest", "axis"), [((3,), -1), ((5, 3), -1), ((3, 2, 2), 1), ((2, 3), [1, 2])]
)
def test_ghost_batches_are_separate_calls(n, rest, axis, mode):
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(2, 3, (n, *rest)), rng.normal(size=(n, *rest))
    arguments = {"axis": axis, "dtype": "float64", "momentum": 0.8}
    ghost = keras_bn.BatchNormalization(virtual_batch_size=4, **arguments)
    plain = keras_bn.BatchNormalization(**arguments)
    for layer in (ghost, plain):
        layer.build((None, *rest))
        gamma = np.random.default_rng(1).normal(size=layer.gamma.shape)
        set_parameters(layer, gamma, gamma + 1)
    got = Step(ghost, mode)(x, upstream)
    parts = []
    statistics = np.zeros_like(gamma), np.ones_like(gamma)
    for group in groups(n, 4):
        # Step starts from 0 and 1: the update is linear in what it starts from.
        part = Step(plain)(x[group], upstream[group])
        parts.append(part)
        mean = part["moving_mean"] + 0.8 * statistics[0]
        variance = part["moving_variance"] + 0.8 * (statistics[1] - 1)
        statistics = mean, variance
    for name in ("y", "dx"):
        want = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(got[name], array(want), rtol=1e-10, atol=1e-11)
    for name in ("d_gamma", "d_beta"):
        want = np.sum([part[name] for part in parts], axis=0)
        np.testing.assert_allclose(got[name], array(want), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(got["moving_mean"], statistics[0], rtol=1e-12)
    np.testing.assert_allclose(got["moving_variance"], statistics[1], rtol=1e-12)


RULES = [
    moving.Rule(momentum, debias, unbiased)
    for momentum in (0.0, 0.7, 1.0, None)
    for debias in (False, True)
    for unbiased in (False, True)
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_groups_in_closed_form_are_one_update_each(rule):
    """With empty groups, bad channels and single elements among them."""
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(size=(6, 3)), rng.uniform(1, 2, (6, 3))
    count = np.array([[4.0], [0.0], [1.0], [5.0], [2.0], [3.0]])
    mean[3, 1] = np.nan
    variance[5, 2] = np.inf
    old = moving.State(
        rng.normal(size=3),
        rng.uniform(1, 2, 3),
        np.array([[2, 0, 1], [1, 0, 1]]) if rule.counts else None,
    )
    at_once = moving.update(old, keras_bn.Moments(count, mean, variance), rule)
    for group in zip(count, mean, variance, strict=True):
        old = moving.update(old, keras_bn.Moments(*group), rule)
    for got, want in zip(at_once, old, strict=True):
        if want is not None:
            np.testing.assert_allclose(got, array(want), rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_ghost_batches_with_masks(mode):
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(2, 3, (9, 4, 3)), rng.normal(size=(9, 4, 3))
    mask = rng.random((9, 4)) < 0.6
    mask[:3] = False  # a whole group
    spread = mask[..., None] & np.ones(3, bool)
    ghost = keras_bn.BatchNormalization(virtual_batch_size=3, dtype="float64")
    ghost.build((None, 4, 3))
    got = Step(ghost, mode, mask)(x, upstream)
    one, zero = np.ones(3), np.zeros(3)
    mean, variance = zero, one
    for group in groups(9, 3)[1:]:
        part = x[group], mask[group]
        want = oracle.forward(part[0], one, zero, (2,), 1e-3, part[1])
        np.testing.assert_allclose(got["y"][group], array(want), rtol=1e-10, atol=1e-11)
        dx, _, _ = oracle.backward(part[0], one, (2,), 1e-3, upstream[group], part[1])
        np.testing.assert_allclose(got["dx"][group], dx, rtol=1e-9, atol=1e-10)
        _, m, v = oracle.moments(part[0], (2,), part[1])
        mean, variance = 0.99 * mean + 0.01 * m, 0.99 * variance + 0.01 * v
    np.testing.assert_allclose(got["moving_mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(got["moving_variance"], variance, rtol=1e-12)
    upstream = np.where(spread, upstream, 0)
    clean = Step(ghost, mode, mask)(x, upstream)
    dirty = Step(ghost, mode, mask)(np.where(spread, x, np.nan), upstream)
    for name in clean:
        keep = spread if clean[name].shape == x.shape else ...
        np.testing.assert_array_equal(dirty[name][keep], clean[name][keep])


def test_inference_never_looks_at_the_groups():
    ghost = keras_bn.BatchNormalization(virtual_batch_size=4)
    plain = keras_bn.BatchNormalization()
    for x in batches(3, (5, 3), dtype="float32"):
        np.testing.assert_array_equal(array(ghost(x)), array(plain(x)))


# Together


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"virtual_batch_size": 4, "synchronized": True},
            "`virtual_batch_size` and `synchronized` exclude each other. "
            "Received: virtual_batch_size=4, synchronized=True",
        ),
        (
            {"virtual_batch_size": 4, "renorm": True},
            "`virtual_batch_size` and `renorm` exclude each other. "
            "Received: virtual_batch_size=4, renorm=True",
        ),
        (
            {"virtual_batch_size": 0},
            "`virtual_batch_size` must be a positive int or None. "
            "Received: virtual_batch_size=0",
        ),
        (
            {"virtual_batch_size": 2.5},
            "`virtual_batch_size` must be a positive int or None. "
            "Received: virtual_batch_size=2.5",
        ),
        (
            {"renorm": True, "renorm_clipping": {"rmix": 1}},
            "Received invalid keys for `renorm_clipping`, which takes "
            "['rmax', 'rmin', 'dmax']. Received: ['rmix']",
        ),
        (
            {"renorm": True, "renorm_clipping": {"rmax": 1, "rmin": 2}},
            "rmax should be greater than or equal to rmin in `renorm_clipping`. "
            "Received: rmax=1.0, rmin=2.0",
        ),
        (
            {"renorm": True, "renorm_clipping": {"dmax": -1}},
            "dmax should be non-negative in `renorm_clipping`. Received: dmax=-1.0",
        ),
        (
            {"renorm_momentum": 2},
            "`renorm_momentum` must be between 0 and 1. Received: renorm_momentum=2",
        ),
    ],
)
def test_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        keras_bn.BatchNormalization(**arguments)


def test_ghost_batches_need_the_batch_on_axis_0():
    layer = keras_bn.BatchNormalization(axis=0, virtual_batch_size=2)
    with pytest.raises(ValueError, match="must not be a channel axis then"):
        layer.build((4, 3))


def combinations():
    for ramp, momentum, debias, unbiased, ghost in itertools.product(
        (None, {}, "ramp"), (0.9, None), (False, True), (False, True), (None, 4)
    ):
        if ghost and ramp is not None:
            continue
        arguments = {
            "renorm": ramp is not None,
            "renorm_clipping": keras_bn.renorm_ramp(scale=0.001) if ramp else ramp,
            "momentum": momentum,
            "debias": debias,
            "unbiased": unbiased,
            "virtual_batch_size": ghost,
        }
        marks = [] if debias and unbiased else pytest.mark.slow
        yield pytest.param(arguments, id=name_of(arguments), marks=marks)


@pytest.mark.parametrize("arguments", combinations())
def test_every_combination(arguments, tmp_path):
    """Eager = graph = XLA; config and file round trips, resumed in the middle."""
    data = list(batches(8, (11, 3), dtype="float64"))
    runs = []
    for mode in MODES:
        layer = keras_bn.BatchNormalization(dtype="float64", **arguments)
        layer.build((None, 3))
        step = in_mode(
            lambda x, layer=layer: layer(x, training=True), mode, layer.variables
        )
        runs.append(
            [array(step(tensor(x))) for x in data] + list(state(layer).values())
        )
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            np.testing.assert_allclose(array(b), array(a), rtol=1e-9, atol=1e-10)

    inputs = keras.Input((3,), dtype="float64")
    layer = keras_bn.BatchNormalization(dtype="float64", **arguments)
    model = keras.Model(inputs, layer(inputs))
    for x in data[:4]:
        model(x, training=True)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    again = loaded.layers[-1]
    assert again.get_config() == layer.get_config()
    for x in data[4:]:
        np.testing.assert_array_equal(
            array(model(x, training=True)), array(loaded(x, training=True))
        )
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(array(a), array(b))
    for got, want in zip(state(layer).values(), runs[0][len(data) :], strict=True):
        np.testing.assert_allclose(got, array(want), rtol=1e-12)


@pytest.mark.parametrize("arguments", [{"renorm": True}, {"virtual_batch_size": 3}])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_options_against_differences(arguments, mode):
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(2, 3, (7, 2)), rng.normal(size=(7, 2))
    layer = keras_bn.BatchNormalization(dtype="float64", **arguments)
    layer.build((None, 2))
    set_parameters(layer, [0.5, 1.5], [0.3, -0.2])
    initial = layer.get_weights()
    if arguments.get("renorm"):
        # r and d are constants to differentiation: hold them at their values.
        r, d = renorm.correction(
            moving.State(
                mean=None,
                variance=None,
                stddev=layer.moving_stddev,
                renorm_mean=layer.renorm_mean,
                renorm_stddev=layer.renorm_stddev,
            ),
            keras_bn.Moments(7.0, x.mean(0), x.var(0)),
            renorm.bounds({}, None, "float64"),
            layer.epsilon,
        )
        r, d = array(r), array(d)
        gamma, beta = initial[0] * r, initial[1] + initial[0] * d

        def loss(x):
            return (upstream * oracle.forward(x, gamma, beta, (1,), 1e-3)).sum()
    else:

        def loss(x):
            parts = [
                oracle.forward(x[g], initial[0], initial[1], (1,), 1e-3)
                for g in groups(7, 3)
            ]
            return (upstream * np.concatenate(parts)).sum()

    got = Step(layer, mode)(x, upstream)
    assert relative_error(got["dx"], oracle.gradient(loss, x)) < 1e-11


@pytest.mark.parametrize("bad", [-0.5, np.nan, np.inf])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_bad_moving_variance_in_a_file_is_refused(bad, trainable, tmp_path):
    def model():
        bn = keras_bn.BatchNormalization(name="bn_7", trainable=trainable)
        return keras.Sequential([keras.Input((3,)), bn])

    sick = model()
    sick.layers[0].moving_variance.assign([1, bad, 2])
    sick.save_weights(tmp_path / "m.weights.h5")
    healthy = model()
    before = healthy.get_weights()
    with pytest.raises(ValueError, match=r"'bn_7' can't load .* in channel 1"):
        healthy.load_weights(tmp_path / "m.weights.h5")
    for was, now in zip(before, healthy.get_weights(), strict=True):
        np.testing.assert_array_equal(now, was)


@pytest.mark.skipif(
    backend.NAME == "jax", reason="on JAX no layer can be updated in a checkpoint"
)
@pytest.mark.parametrize(
    "bn", [keras.layers.BatchNormalization, keras_bn.BatchNormalization]
)
def test_rematerialized_it_updates_twice_at_the_root_of_the_momentum(bn):
    """As Keras's layer does; docs/faq.md says what to do."""
    x = tensor(np.random.default_rng(0).normal(3, 2, (8, 4)), "float32")

    def moved(momentum, wrap):
        layer = bn(momentum=momentum)
        layer.build(x.shape)
        function = wrap(lambda x: layer(x, training=True))
        backend.training_step(function, layer.variables, "eager")(x, x)
        return layer.moving_mean.numpy(), layer.moving_variance.numpy()

    once = moved(0.9, lambda function: function)
    # PyTorch computes again what is saved, and ours updates after that.
    twice = backend.NAME != "torch" or bn is keras.layers.BatchNormalization
    momentum, other = (0.9**0.5, 0.9) if twice else (0.9, 0.9**0.5)
    np.testing.assert_allclose(once, moved(momentum, keras.remat), rtol=1e-5)
    assert not np.allclose(once, moved(other, keras.remat), rtol=1e-2)
