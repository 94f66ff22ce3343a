"""Checks that need two replicas: `python replicas.py NAME ours|keras` prints JSON."""

import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import keras_bn

SHARES = (6, 2)


def spread(strategy, parts):
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


def trained(strategy, cls, x, mask=None, **arguments):
    """A layer after one training step in which each replica has its share."""
    with strategy.scope():
        layer = cls(momentum=0.0, **arguments)
        layer.build((None, *x.shape[1:]))
    xs = spread(strategy, np.split(x, [SHARES[0]]))
    masks = spread(strategy, np.split(np.ones(x.shape[:-1], bool), [SHARES[0]]))
    if mask is not None:
        masks = spread(strategy, np.split(mask, [SHARES[0]]))

    @tf.function
    def step():
        def on_replica(x, m):
            return layer(x, training=True, mask=None if mask is None else m)

        return strategy.run(on_replica, args=(xs, masks))

    step()
    return layer


def large_mean(strategy, cls):
    x = np.random.default_rng(0).normal(1e4, 1, (8, 3)).astype("float32")
    layer = trained(strategy, cls, x, synchronized=True)
    exact = x.astype("float64").var(0)
    np.testing.assert_allclose(layer.moving_variance.numpy(), exact, rtol=1e-5)


def masked(strategy, cls):
    rng = np.random.default_rng(0)
    x, mask = rng.normal(3, 2, (8, 4, 3)).astype("float32"), rng.random((8, 4)) < 0.5
    layer = trained(strategy, cls, x, mask, synchronized=True)
    np.testing.assert_allclose(layer.moving_mean.numpy(), x[mask].mean(0), rtol=1e-5)


def unsynchronized(strategy, cls):
    x = np.random.default_rng(0).normal(3, 2, (8, 3)).astype("float32")
    layer = trained(strategy, cls, x)
    first, second = np.split(x, [SHARES[0]])
    copies = strategy.experimental_local_results(layer.moving_mean.value)
    for copy in copies:
        want = (first.mean(0) + second.mean(0)) / 2
        np.testing.assert_allclose(copy.numpy(), want, rtol=1e-5)


if __name__ == "__main__":
    module = keras_bn if sys.argv[1] == "ours" else keras.layers
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    verdicts = {}
    for name in sys.argv[2:]:
        try:
            globals()[name](strategy, module.BatchNormalization)
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            verdicts[name] = {"holds": False, "why": why}
        else:
            verdicts[name] = {"holds": True, "why": ""}
    print(json.dumps(verdicts))
