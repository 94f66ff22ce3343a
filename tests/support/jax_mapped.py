"""Training steps that `jax.shard_map` and `jax.pmap` map over four devices.

Usage: jax_mapped.py CASE. It raises unless the step is the oracle's.
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_ENABLE_X64"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, PartitionSpec

import keras_bn

DEVICES, ROWS, CHANNELS = 4, 4, 3
WHOLE, SHARES = PartitionSpec(), PartitionSpec("batch")
ONES, ZEROS = np.ones(CHANNELS), np.zeros(CHANNELS)


def draw(mean=3.0):
    """A batch whose shares differ, an upstream gradient, and a mask."""
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 1, (DEVICES * ROWS, CHANNELS))
    x += np.repeat([0, 0, 2, 5], ROWS)[:, None]
    mask = rng.random(len(x)) < 0.6
    mask[:ROWS] = False
    return x, rng.normal(size=x.shape), mask


def stateless(**options):
    """The layer's training step, as a function of its weights; and these."""
    layer = keras_bn.BatchNormalization(momentum=0.0, dtype="float64", **options)
    layer.build((None, CHANNELS))
    weights = [v.value for v in layer.trainable_variables]
    state = [v.value for v in layer.non_trainable_variables]

    def run(weights, x, mask=None):
        return layer.stateless_call(weights, state, x, training=True, mask=mask)

    return run, weights


def differentiated(run, weights, x, upstream, mask=None):
    """`(y, dx, gradients of the weights, state)` of what a device has."""

    def loss(weights, x):
        y, state = run(weights, x, mask)
        return jnp.sum(y * upstream), (y, state)

    take = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (_, (y, state)), (by_weights, dx) = take(weights, x)
    return y, dx, by_weights, state


def mesh(*names):
    sizes = (DEVICES,) if len(names) == 1 else (2, 2)
    return Mesh(np.array(jax.devices()).reshape(sizes), names)


def mapped(synchronized, masked=False, checks=True, mean=3.0):
    """A step under `jax.shard_map`."""
    run, weights = stateless(synchronized=synchronized)
    data = draw(mean)[: 3 if masked else 2]

    def step(weights, *data):
        y, dx, by_weights, state = differentiated(run, weights, *data)
        if not checks:
            by_weights = jax.lax.psum(by_weights, "batch")
        if not synchronized:
            state = jax.lax.pmean(state, "batch")
        return y, dx, by_weights, state

    step = jax.shard_map(
        step,
        mesh=mesh("batch"),
        in_specs=(WHOLE, *[SHARES] * len(data)),
        out_specs=(SHARES, SHARES, WHOLE, WHOLE),
        check_vma=checks,
    )
    return jax.jit(step)(weights, *data)


def expected(x, upstream, mask=None):
    """What a step on the whole batch gives."""
    _, mean, variance = oracle.moments(x, (1,), mask)
    dx, *by_weights = oracle.backward(x, ONES, (1,), 1e-3, upstream, mask)
    y = oracle.forward(x, ONES, ZEROS, (1,), 1e-3, mask)
    return y, dx, by_weights, [mean, variance]


def compare(got, want, tolerance=1e-9):
    for mine, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, right, rtol=tolerance, atol=tolerance)


def synchronized(checks=True):
    for masked in (False, True):
        data = draw()[: 3 if masked else 2]
        compare(mapped(True, masked, checks), expected(*data))


def without_checks():
    synchronized(checks=False)


def large_means():
    compare(mapped(True, mean=1e7), expected(*draw(1e7)[:2]), 1e-7)


def apart():
    """Without synchronization each device normalizes its share."""
    x, upstream, _ = draw()
    for checks in (True, False):
        y, dx, by_weights, state = mapped(False, checks=checks)
        parts = zip(np.split(x, DEVICES), np.split(upstream, DEVICES), strict=True)
        parts = [expected(*part) for part in parts]
        compare(y, np.concatenate([part[0] for part in parts]))
        compare(dx, np.concatenate([part[1] for part in parts]))
        compare(by_weights, list(np.sum([part[2] for part in parts], axis=0)))
        compare(state, list(np.mean([part[3] for part in parts], axis=0)))


def pmapped():
    run, weights = stateless(synchronized=True)
    x, upstream, _ = draw()

    def step(x, upstream):
        y, dx, by_weights, state = differentiated(run, weights, x, upstream)
        return y, dx, jax.lax.psum(by_weights, "devices"), state

    shares = (part.reshape(DEVICES, ROWS, CHANNELS) for part in (x, upstream))
    y, dx, by_weights, state = jax.pmap(step, axis_name="devices")(*shares)
    first = jax.tree.map(lambda value: value[0], (by_weights, state))
    whole = [value.reshape(x.shape) for value in (y, dx)]
    compare([*whole, *first], list(expected(x, upstream)))


def two_axes():
    """Over one of two axes it works; over two it is refused: one may hold channels."""
    run, weights = stateless(synchronized=True)
    x, _, _ = draw()
    how = {"mesh": mesh("batch", "model"), "in_specs": SHARES}
    how["out_specs"] = (SHARES, WHOLE)
    with pytest.raises(ValueError, match=r"mapped over the axes \['batch', 'model'\]"):
        jax.shard_map(lambda x: run(weights, x), **how)(x)
    one = jax.shard_map(lambda x: run(weights, x), axis_names={"batch"}, **how)
    compare(jax.jit(one)(x)[1], expected(x, x)[3])


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("as it must be")
