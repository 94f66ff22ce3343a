"""A training step of one layer, spread over the replicas of a strategy, as arrays."""

import functools
from unittest import mock

import keras
import numpy as np
from conftest import REPLICAS

from support.backend import tf
from support.steps import array, relative_error


@functools.cache
def strategy_of(name):
    """The strategy of a name, such as "mirrored 2"."""
    kind, _, replicas = name.partition(" ")
    devices = [f"CPU:{i}" for i in range(int(replicas or REPLICAS))]
    if kind == "mirrored":
        return _mirrored(devices)
    if kind == "central":
        return tf.distribute.experimental.CentralStorageStrategy(devices, "CPU:0")
    return tf.distribute.OneDeviceStrategy("CPU:0")


def _mirrored(devices):
    """A MirroredStrategy beside which others of other sizes can run.

    TensorFlow numbers the groups of devices of every strategy from 1, and refuses
    when it then finds another size under the same number.
    """
    strategy = tf.distribute.MirroredStrategy
    with mock.patch.object(strategy, "_collective_key_base", 10 * len(devices)):
        return strategy(devices)


def draw(shares, shape=(4, 3), offset=1e4, channels=3, dtype="float64"):
    """Input, upstream gradient, mask, gamma and beta of a whole batch."""
    rng = np.random.default_rng(sum(shares))
    x = rng.normal(offset, 1, (sum(shares), *shape)).astype(dtype)
    upstream = rng.normal(size=x.shape)
    mask = rng.random(x.shape[:-1]) < 0.6
    return x, upstream, mask, rng.normal(1, 0.5, channels), rng.normal(size=channels)


def compare(got, want, tolerance):
    assert want.keys() <= got.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        assert relative_error(got[name], value) <= tolerance, name


def split(x, shares):
    """The rows of `x`, in order, in as many parts as there are shares."""
    return None if x is None else np.split(x, np.cumsum(shares)[:-1])


def spread(strategy, parts):
    """One part for each replica; None stays None."""
    if parts is None:
        return None
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )


def parts_of(strategy, value):
    """What each replica of this process has of a value, as float64 arrays."""
    return [array(part) for part in strategy.experimental_local_results(value)]


def mean_of_separate_layers(make, xs, masks=None, bad=()):
    """The state of one layer for each part, in the mean over those that aren't bad."""
    layers = []
    for i, x in enumerate(xs):
        layer = make()
        layer.build((None, *x.shape[1:]))
        layer(tf.constant(x), training=True, mask=None if masks is None else masks[i])
        layers.append(layer)
    good = [layer for i, layer in enumerate(layers) if i not in bad]
    variables = zip(*(layer.non_trainable_weights for layer in good), strict=True)
    return {
        same[0].name: np.mean([array(variable) for variable in same], axis=0)
        for same in variables
    }


def in_scope(strategy, make, shape, gamma=None, beta=None):
    """A layer made and built under a strategy, with given parameters."""
    with strategy.scope():
        layer = make()
        layer.build((None, *shape))
        if gamma is not None:
            layer.gamma.assign(gamma)
            layer.beta.assign(beta)
    return layer


def state(strategy, layer):
    """The layer's state as arrays, once all replicas are seen to have the same bits."""
    arrays = {}
    for variable in layer.non_trainable_weights:
        first, *others = parts_of(strategy, variable.value)
        for other in others:
            np.testing.assert_array_equal(first, other, variable.name)
        arrays[variable.name] = first
    return arrays


def save_everywhere(model, folder):
    """Save a model in every way there is; `load_everywhere` reads all but the last."""
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    tf.train.Checkpoint(model=model).write(str(folder / "checkpoint"))
    model.export(folder / "exported", verbose=False)


def load_everywhere(make, folder):
    """The models that `save_everywhere` saved, loaded into new ones where need be."""
    weights, restored = make(), make()
    weights.load_weights(folder / "model.weights.h5")
    checkpoint = tf.train.Checkpoint(model=restored)
    checkpoint.read(str(folder / "checkpoint")).expect_partial()
    return [keras.models.load_model(folder / "model.keras"), weights, restored]


class SpreadStep:
    """A training step on the replicas of a strategy; see `steps.Step`.

    Called with parts of an input, of an upstream gradient and of a mask or None, it
    gives a dict of float64 arrays: y, dx, d_gamma, d_beta of the whole batch, and the
    layer's state.
    """

    def __init__(self, strategy, layer, graph=True):
        self.strategy, self.layer = strategy, layer
        weights = [layer.gamma.value, layer.beta.value]

        def on_replica(x, upstream, mask):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, mask=mask)
            return y, tape.gradient(y, [x, *weights], output_gradients=upstream)

        def run(*parts):
            return strategy.run(on_replica, parts)

        self.run = tf.function(run, autograph=False) if graph else run

    def __call__(self, xs, upstreams, masks=None):
        dtype = self.layer.compute_dtype
        xs, upstreams = (
            [tf.constant(part, dtype) for part in parts] for parts in (xs, upstreams)
        )
        arguments = [spread(self.strategy, parts) for parts in (xs, upstreams, masks)]
        y, (dx, d_gamma, d_beta) = self.run(*arguments)
        return {
            "y": np.concatenate(parts_of(self.strategy, y)),
            "dx": np.concatenate(parts_of(self.strategy, dx)),
            # Each replica has its own contribution; the optimizer adds them up.
            "d_gamma": sum(parts_of(self.strategy, d_gamma)),
            "d_beta": sum(parts_of(self.strategy, d_beta)),
            **state(self.strategy, self.layer),
        }
