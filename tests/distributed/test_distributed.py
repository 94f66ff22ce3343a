"""Replicas of one process: synchronized, they are one device; apart, they agree."""

import functools
from collections import Counter

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from support.distributed import (
    SpreadStep,
    compare,
    draw,
    in_scope,
    load_everywhere,
    mean_of_separate_layers,
    parts_of,
    save_everywhere,
    split,
    spread,
    state,
    strategy_of,
)
from support.marks import mostly_slow, slow
from support.steps import Step, array, oracle_step, relative_error, set_parameters
from support.training import Loop, apart, model_of, normalizations, rows

import keras_bn

SHARES = {
    "mirrored 2": [(5, 3), (0, 6)],
    "mirrored 4": [(2, 2, 2, 2), (5, 3, 0, 4)],
}
CASES = [(name, shares) for name, all_shares in SHARES.items() for shares in all_shares]
UNEVEN = ("mirrored 2", (5, 3))


def synchronized(**arguments):
    return functools.partial(
        keras_bn.BatchNormalization, synchronized=True, **arguments
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "shares"), CASES)
def test_synchronized_replicas_are_one_device(name, shares, masked):
    x, upstream, mask, gamma, beta = draw(shares)
    mask = mask if masked else None
    strategy = strategy_of(name)
    layer = in_scope(strategy, synchronized(dtype="float64"), (4, 3), gamma, beta)
    parts = [split(array, shares) for array in (x, upstream, mask)]
    got = SpreadStep(strategy, layer)(*parts)
    want = oracle_step(layer, x, upstream, (2,), gamma, beta, mask)
    # The mean is 1e4 and its rounding 1e-12.
    compare(got, want, 1e-11)


def test_synchronized_replicas_are_one_device_eagerly():
    name, shares = UNEVEN
    x, upstream, mask, gamma, beta = draw(shares)
    strategy = strategy_of(name)
    layer = in_scope(strategy, synchronized(dtype="float64"), (4, 3), gamma, beta)
    parts = [split(array, shares) for array in (x, upstream, mask)]
    got = SpreadStep(strategy, layer, graph=False)(*parts)
    compare(got, oracle_step(layer, x, upstream, (2,), gamma, beta, mask), 1e-11)


@pytest.mark.parametrize(("axis", "channels"), [(1, (4,)), ([1, 2], (4, 3))])
def test_synchronized_with_channels_elsewhere(axis, channels):
    name, shares = UNEVEN
    x, upstream, _, gamma, beta = draw(shares, (4, 3, 2), channels=channels)
    axes = tuple(axis) if isinstance(axis, list) else (axis,)
    strategy = strategy_of(name)
    make = synchronized(axis=axis, dtype="float64")
    layer = in_scope(strategy, make, (4, 3, 2), gamma, beta)
    got = SpreadStep(strategy, layer)(split(x, shares), split(upstream, shares))
    compare(got, oracle_step(layer, x, upstream, axes, gamma, beta), 1e-11)


# Means so large that rounding shows, but that the type still tells the elements apart;
# and half a step of that type from 1 on.
ROUNDING = {
    "float32": (1e4, 2.0**-24),
    "mixed_float16": (20.0, 2.0**-11),
    "mixed_bfloat16": (5.0, 2.0**-8),
}


@pytest.mark.parametrize("policy", mostly_slow(ROUNDING, ["float32", "mixed_float16"]))
def test_synchronized_replicas_round_as_one_device_does(policy):
    name, shares = UNEVEN
    offset, unit = ROUNDING[policy]
    x, upstream, mask, gamma, beta = draw(shares, offset=offset)
    strategy = strategy_of(name)
    layer = in_scope(strategy, synchronized(dtype=policy), (4, 3), gamma, beta)
    parts = [split(array, shares) for array in (x, upstream, mask)]
    got = SpreadStep(strategy, layer)(*parts)
    alone = keras_bn.BatchNormalization(dtype=policy)
    alone.build((None, 4, 3))
    set_parameters(alone, gamma, beta)
    one_device = Step(alone, mask=mask)(x, upstream)
    want = oracle_step(alone, x, upstream, (2,), gamma, beta, mask)
    assert one_device.keys() <= got.keys()
    for key, exact in want.items():
        allowed = 2 * relative_error(one_device[key], exact)
        allowed += unit if key in ("y", "dx") else 2.0**-24
        assert relative_error(got[key], exact) <= allowed, key


OPTIONS = {
    "unbiased, debiased": {"unbiased": True, "debias": True},
    "plain mean": {"momentum": None},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.5}},
    "renorm, ramped": {
        "renorm": True,
        "renorm_clipping": keras_bn.renorm_ramp(begin=1, rmax_end=3, dmax_end=3),
    },
}


@pytest.mark.parametrize(
    "option", mostly_slow(OPTIONS, ["unbiased, debiased", "renorm, ramped"])
)
def test_synchronized_options_are_those_of_one_device(option):
    name, shares = UNEVEN
    strategy = strategy_of(name)
    make = synchronized(dtype="float64", **OPTIONS[option])
    alone = keras_bn.BatchNormalization(dtype="float64", **OPTIONS[option])
    alone.build((None, 4, 3))
    layer = in_scope(strategy, make, (4, 3))
    step = SpreadStep(strategy, layer)
    rng = np.random.default_rng(0)
    for _ in range(2):
        x, upstream = rng.normal(3, 2, (2, sum(shares), 4, 3))
        mask = rng.random(x.shape[:-1]) < 0.6
        got = step(*(split(array, shares) for array in (x, upstream, mask)))
        with tf.GradientTape() as tape:
            whole = tf.constant(x)
            tape.watch(whole)
            y = alone(whole, training=True, mask=mask)
        dx = tape.gradient(y, whole, output_gradients=upstream)
        weights = {w.name: array(w) for w in alone.non_trainable_weights}
        compare(got, {"y": array(y), "dx": array(dx), **weights}, 1e-12)


def test_unbiased_counts_the_elements_of_all_replicas():
    name, shares = UNEVEN
    x, upstream, mask, gamma, beta = draw(shares)
    make = synchronized(dtype="float64", unbiased=True, momentum=0.0)
    strategy = strategy_of(name)
    layer = in_scope(strategy, make, (4, 3), gamma, beta)
    got = SpreadStep(strategy, layer)(*(split(a, shares) for a in (x, upstream, mask)))
    n, _, variance = oracle.moments(x, (2,), mask)
    want = variance * n / (n - 1)
    assert relative_error(got["moving_variance"], want) < 1e-11


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("why", ["empty", "masked whole"])
def test_nothing_that_counts_on_any_replica_changes_nothing(why, together):
    strategy = strategy_of("mirrored 2")
    shares = (0, 0) if why == "empty" else (2, 1)
    x, upstream, mask, gamma, beta = draw(shares)
    mask = np.zeros_like(mask)

    def make():
        return keras_bn.BatchNormalization(synchronized=together, debias=True)

    layer = in_scope(strategy, make, (4, 3), gamma, beta)
    before = state(strategy, layer)
    got = SpreadStep(strategy, layer)(*(split(a, shares) for a in (x, upstream, mask)))
    for variable, value in before.items():
        np.testing.assert_array_equal(got[variable], value)


APART = {
    "defaults": {},
    **OPTIONS,
    "ghost batches": {"virtual_batch_size": 2, "debias": True},
}


@pytest.mark.parametrize(
    "option", mostly_slow(APART, ["defaults", "unbiased, debiased", "ghost batches"])
)
def test_replicas_apart_keep_the_mean_of_their_statistics(option):
    # An empty share has no part in the mean.
    name, shares = "mirrored 4", (4, 5, 0, 4)
    x, upstream, mask, gamma, beta = draw(shares, offset=3)

    def make():
        return keras_bn.BatchNormalization(dtype="float64", **APART[option])

    strategy = strategy_of(name)
    layer = in_scope(strategy, make, (4, 3), gamma, beta)
    parts = [split(array, shares) for array in (x, upstream, mask)]
    got = SpreadStep(strategy, layer)(*parts)
    want = mean_of_separate_layers(make, parts[0], parts[2], bad=(2,))
    compare(got, want, 1e-14)
    # Each replica is normalized with its own batch.
    if not option.startswith(("renorm", "ghost")):
        epsilon = layer.epsilon
        outputs = [
            oracle.forward(x, gamma, beta, (2,), epsilon, mask)
            for x, mask in zip(parts[0], parts[2], strict=True)
            if len(x)
        ]
        assert relative_error(got["y"], np.concatenate(outputs)) < 1e-12


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("value", [np.nan, slow(np.inf)])
def test_a_bad_channel_on_one_replica(value, together):
    name, shares = UNEVEN
    x, upstream, _, gamma, beta = draw(shares, offset=3)
    x[2, 1, 0] = value  # on the first replica

    def make():
        return keras_bn.BatchNormalization(
            dtype="float64", synchronized=together, debias=True
        )

    strategy = strategy_of(name)
    layer = in_scope(strategy, make, (4, 3), gamma, beta)
    got = SpreadStep(strategy, layer)(split(x, shares), split(upstream, shares))
    if together:
        # Nobody knows the mean of that channel, so it keeps what it had.
        assert got["moving_mean"][0] == 0
        assert got["moving_variance"][0] == 1
        np.testing.assert_array_equal(got["updates"], [[0, 1, 1]] * 2)
        _, mean, variance = oracle.moments(x[..., 1:], (2,))
        compare(
            {k: got[k][1:] for k in ("moving_mean", "moving_variance")},
            {"moving_mean": mean, "moving_variance": variance},
            1e-12,
        )
    else:
        parts = split(x, shares)
        bad = mean_of_separate_layers(make, parts, bad=(0, 2))
        good = mean_of_separate_layers(make, parts, bad=(2,))
        for key in ("moving_mean", "moving_variance", "updates"):
            want = np.concatenate([bad[key][..., :1], good[key][..., 1:]], -1)
            assert relative_error(got[key], want) < 1e-14, key


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_training_as_a_tensor(together, graph):
    """A reduction inside a conditional would have to meet another that never comes."""
    shares = (3, 5)
    x, upstream, _, gamma, beta = draw(shares, offset=3)
    strategy = strategy_of("mirrored 2")

    def make():
        return keras_bn.BatchNormalization(synchronized=together, dtype="float64")

    layer = in_scope(strategy, make, (4, 3), gamma, beta)
    known = in_scope(strategy, make, (4, 3), gamma, beta)

    def on_replica(x, upstream, training):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x, training=training)
        sources = [x, layer.gamma.value, layer.beta.value]
        return y, tape.gradient(y, sources, output_gradients=upstream)

    def run(*arguments):
        return strategy.run(on_replica, arguments)

    run = tf.function(run, autograph=False) if graph else run
    parts = [split(array, shares) for array in (x, upstream)]
    arguments = [spread(strategy, part) for part in parts]
    y, gradients = run(*arguments, tf.constant(True))
    want = SpreadStep(strategy, known)(*parts)
    got = {"y": np.concatenate(parts_of(strategy, y)), **state(strategy, layer)}
    got["dx"] = np.concatenate(parts_of(strategy, gradients[0]))
    got["d_gamma"] = sum(parts_of(strategy, gradients[1]))
    got["d_beta"] = sum(parts_of(strategy, gradients[2]))
    compare(got, want, 1e-13)

    before = state(strategy, layer)
    y, (dx, *_) = run(*arguments, tf.constant(False))
    for variable, value in state(strategy, layer).items():
        np.testing.assert_array_equal(value, before[variable])
    mean, variance = before["moving_mean"], before["moving_variance"]
    want = oracle.normalize(x, mean, variance, gamma, beta, (2,), layer.epsilon)
    assert relative_error(np.concatenate(parts_of(strategy, y)), want) < 1e-12
    want = upstream * gamma / np.sqrt(variance + layer.epsilon)
    assert relative_error(np.concatenate(parts_of(strategy, dx)), want) < 1e-12


def test_gradient_penalty_across_replicas():
    """Second derivatives pass through both reductions."""
    shares = (3, 5)
    x, upstream, _, gamma, beta = draw(shares, offset=3)

    def penalty_gradient(layer, x, upstream):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = layer(x, training=True)
            dx = inner.gradient(y, x, output_gradients=upstream)
            penalty = tf.reduce_sum(tf.square(dx) * tf.sin(upstream))
        return outer.gradient(penalty, x)

    strategy = strategy_of("mirrored 2")
    layer = in_scope(strategy, synchronized(dtype="float64"), (4, 3), gamma, beta)

    @tf.function(autograph=False)
    def run(x, upstream):
        return strategy.run(penalty_gradient, (layer, x, upstream))

    got = run(*(spread(strategy, split(a, shares)) for a in (x, upstream)))
    alone = keras_bn.BatchNormalization(dtype="float64")
    alone.build((None, 4, 3))
    set_parameters(alone, gamma, beta)
    want = penalty_gradient(alone, tf.constant(x), tf.constant(upstream))
    assert relative_error(np.concatenate(parts_of(strategy, got)), array(want)) < 1e-10


def collectives(function, *arguments):
    """The collective ops in a tf.function's graph: how many of each type and size."""
    graph = function.get_concrete_function(*arguments).graph
    inner = (f.graph for f in graph._functions.values() if hasattr(f, "graph"))
    ops = [op for g in (graph, *inner) for op in g.get_operations()]
    return Counter(
        (op.type, op.inputs[0].shape.num_elements() * op.inputs[0].dtype.size)
        for op in ops
        if op.type.startswith("Collective")
    )


@pytest.mark.parametrize(
    ("arguments", "bytes_sent"),
    [
        ({"synchronized": True}, lambda r, c: [r * (12 * c + 4), 8 * c]),
        (
            {"synchronized": True, "renorm": True, "debias": True},
            lambda r, c: [r * (12 * c + 4), 8 * c],
        ),
        ({}, lambda r, c: [16 * c]),
        ({"debias": True}, lambda r, c: [32 * c]),
        ({"renorm": True}, lambda r, c: [40 * c]),
    ],
)
@pytest.mark.parametrize("name", ["mirrored 2", slow("mirrored 4")])
def test_one_collective_for_each_direction(name, arguments, bytes_sent):
    """Their sizes stand in docs/distributed.md."""
    strategy = strategy_of(name)
    replicas = strategy.num_replicas_in_sync
    layer = in_scope(strategy, lambda: keras_bn.BatchNormalization(**arguments), (4, 3))
    xs = spread(strategy, np.ones((replicas, 2, 4, 3), "float32"))
    found = collectives(SpreadStep(strategy, layer).run, xs, xs, None)
    sizes = bytes_sent(replicas, 3)
    assert found == {("CollectiveReduceV2", size): replicas for size in sizes}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ["central 2", "one"])
def test_other_strategies(name, together):
    strategy = strategy_of(name)
    shares = (5, 3)[: strategy.num_replicas_in_sync]
    x, upstream, mask, gamma, beta = draw(shares)

    def make():
        return keras_bn.BatchNormalization(synchronized=together, dtype="float64")

    layer = in_scope(strategy, make, (4, 3), gamma, beta)
    parts = [split(array, shares) for array in (x, upstream, mask)]
    got = SpreadStep(strategy, layer)(*parts)
    if together or len(shares) == 1:
        want = oracle_step(layer, x, upstream, (2,), gamma, beta, mask)
        compare(got, want, 1e-11)
    else:
        compare(got, mean_of_separate_layers(make, parts[0], parts[2]), 1e-11)


# Training of whole models


def fit(strategy, model, n=16):
    x, y = rows(n)
    with strategy.scope():
        model = model()
        model.compile("sgd", "mse")
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model


MODELS = [
    ("mirrored 2", (5, 3)),
    slow("mirrored 4", (4, 1, 0, 3)),
]


@pytest.mark.parametrize(
    "name", ["mirrored 2", slow("mirrored 4"), slow("central 2"), slow("one")]
)
def test_fit_synchronized_is_fit_on_one_device(name):
    strategy = strategy_of(name)
    model = fit(strategy, lambda: model_of(True))
    alone = fit(tf.distribute.get_strategy(), lambda: model_of(True))
    for layer in normalizations(model):
        state(strategy, layer)
    # Keras takes the loss in float32.
    assert apart(model, alone) < 1e-6


@pytest.mark.parametrize("together", [slow(True), False])
def test_fit_with_a_last_batch_smaller_than_the_replicas(together):
    strategy = strategy_of("mirrored 2")
    model = fit(strategy, lambda: model_of(together), n=9)
    for layer in normalizations(model):
        got = state(strategy, layer)
        assert all(np.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("together", [True, slow(False)])
def test_fit_with_an_overflow_on_one_replica(together):
    """mixed_float16: the loss-scale optimizer skips the step, and so do we."""
    strategy = strategy_of("mirrored 2")
    x, y = rows(8)
    with strategy.scope():
        model = model_of(together, "mixed_float16")
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
        model.compile(optimizer, "mse")
    x[1] = 1e6  # on the first replica; infinite in float16
    before = state(strategy, model.layers[1])
    weights = [array(w) for w in model.trainable_weights]
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    got = state(strategy, model.layers[1])
    for value, weight in zip(weights, model.trainable_weights, strict=True):
        np.testing.assert_array_equal(value, array(weight))
    for key, value in got.items():
        assert np.isfinite(value).all(), key
        assert (value != before[key]).all() == (not together), key


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("name", "shares"), MODELS)
def test_custom_loop(name, shares, together):
    strategy = strategy_of(name)
    with strategy.scope():
        model = model_of(together)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    alone = model_of(together)
    alone.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    loop = Loop(strategy, model, shares)
    loop_alone = Loop(tf.distribute.get_strategy(), alone, [sum(shares)])
    for number in range(2):
        loop.step(number)
        loop_alone.step(number)
    for layer in normalizations(model):
        state(strategy, layer)
    assert apart(model, alone) < 1e-12 if together else apart(model, alone) > 1e-3


def test_every_saved_file_has_what_every_replica_has(tmp_path):
    strategy, shares = strategy_of("mirrored 4"), (5, 3, 0, 4)
    x, upstream, *_ = draw(shares, offset=3)

    def make():
        layer = keras_bn.BatchNormalization(dtype="float64")
        return keras.Sequential([keras.Input((4, 3)), layer])

    with strategy.scope():
        model = make()
    got = SpreadStep(strategy, model.layers[0])(
        split(x, shares), split(upstream, shares)
    )
    save_everywhere(model, tmp_path)
    for loaded in load_everywhere(make, tmp_path):
        for key in ("moving_mean", "moving_variance"):
            got_there = array(getattr(loaded.layers[0], key))
            np.testing.assert_array_equal(got_there, got[key])
    exported = tf.saved_model.load(tmp_path / "exported")
    served = exported.serve(tf.constant(x, tf.float32))
    np.testing.assert_allclose(array(served), array(loaded(x)), rtol=1e-5)
