"""A small model and a training loop that is the same under every strategy."""

import keras
import numpy as np

import keras_bn
from support.backend import tf
from support.distributed import split, spread
from support.steps import array


def model_of(together, dtype="float64", between=None):
    """A regression model with two `keras_bn` layers, and one between them if given."""
    keras.utils.set_random_seed(0)

    def block(units):
        # A bias before the normalization would have a gradient of nothing but rounding.
        yield keras.layers.Dense(units, use_bias=False, dtype=dtype)
        yield keras_bn.BatchNormalization(
            synchronized=together, momentum=0.9, dtype=dtype
        )

    layers = [*block(5), *([] if between is None else [between]), *block(4)]
    head = keras.layers.Dense(1, dtype=dtype)
    return keras.Sequential([keras.Input((6,)), *layers, head])


def normalizations(model):
    return [x for x in model.layers if isinstance(x, keras_bn.BatchNormalization)]


def rows(n, seed=0):
    """Input and target of `n` rows."""
    x = np.random.default_rng(seed).normal(2, 1, (n, 6))
    return x, np.sin(x[:, :1])


def apart(one, other):
    """The largest difference between the weights of two models."""
    pairs = zip(one.weights, other.weights, strict=True)
    return max(np.max(np.abs(array(a) - array(b))) for a, b in pairs)


class Loop:
    """Steps of a compiled model in which every row of the whole batch weighs the same.

    Args:
        strategy: what the model was made under.
        model: a compiled model.
        shares: how many rows of a batch each replica takes.
    """

    def __init__(self, strategy, model, shares):
        self.strategy, self.shares = strategy, shares
        with strategy.scope():
            model.optimizer.build(model.trainable_weights)

        def on_replica(x, y):
            with tf.GradientTape() as tape:
                errors = tf.square(model(x, training=True) - y)
                loss = tf.reduce_sum(errors) / sum(shares)
            weights = model.trainable_weights
            # The optimizer adds up the gradients of the replicas.
            model.optimizer.apply(tape.gradient(loss, weights), weights)

        self.run = tf.function(
            lambda *parts: strategy.run(on_replica, parts), autograph=False
        )

    def step(self, number):
        batch = rows(sum(self.shares), seed=number)
        self.run(*(spread(self.strategy, split(part, self.shares)) for part in batch))
