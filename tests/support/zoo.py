"""Small models, one for each way a batch normalization sits in one."""

import keras
import numpy as np
from keras import layers


def randomized(model, seed=0):
    """The model, with weights and statistics as if it had been trained."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        name, shape = variable.path.rsplit("/", 1)[-1], variable.shape
        if "variance" in name or "stddev" in name:
            variable.assign(rng.uniform(0.5, 2.0, shape))
        elif name in ("moving_mean", "beta", "bias", "renorm_mean"):
            variable.assign(rng.normal(0.0, 0.5, shape))
        elif name == "gamma":
            variable.assign(rng.uniform(0.5, 1.5, shape))
    return model


def inputs_of(model, n=4, seed=1):
    """Random input of the structure that the model asks for."""
    rng = np.random.default_rng(seed)

    def one(tensor):
        shape = (n, *(size or 5 for size in tensor.shape[1:]))
        if "int" in tensor.dtype:
            return rng.integers(0, 5, shape).astype(tensor.dtype)
        return rng.normal(0.3, 2.0, shape).astype(tensor.dtype)

    if isinstance(model, keras.Sequential):
        return one(model.inputs[0])
    return keras.tree.map_structure(one, model.input)


def sequential(bn=layers.BatchNormalization):
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(6),
            bn(momentum=0.9, name="first"),
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.Dense(3),
        ],
        name="chain",
    )


def convolutional(bn=layers.BatchNormalization):
    image = keras.Input((12, 12, 3))
    x = layers.Conv2D(4, 3, padding="same", use_bias=False)(image)
    x = bn(name="first")(x)
    x = skip = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = bn(name="second", scale=False, epsilon=1e-5)(x)
    x = layers.add([x, skip])
    x = bn(name="after_add", gamma_regularizer="l2", center=False)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(3)(x))


def several(bn=layers.BatchNormalization):
    """Two inputs, a dict of outputs, a shared layer, plain operations."""
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    shared, dense = bn(name="shared"), layers.Dense(6, name="twin")
    left, right = shared(dense(a)), shared(dense(b))
    left = keras.ops.relu(left) * 2.0
    return keras.Model(
        {"a": a, "b": b}, {"sum": left + right, "right": bn(name="last")(right)}
    )


def nested(bn=layers.BatchNormalization):
    """A block called twice, in a model in a model; its norm also used outside."""
    norm = bn(name="inner_norm")
    block = keras.Sequential([keras.Input((5,)), layers.Dense(5), norm], name="block")
    x = keras.Input((5,))
    middle = keras.Model(x, norm(block(layers.ReLU()(block(x)))), name="middle")
    y = keras.Input((5,))
    return keras.Model(y, layers.Dense(2)(middle(y)), name="outer")


def masked(bn=layers.BatchNormalization, training=False):
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(5, 4, mask_zero=True)(tokens)
    x = bn(name="sequence")(x)
    x = layers.LSTM(3, return_sequences=True)(x)
    mask = keras.ops.not_equal(tokens, 0)
    # Keras 3.16 keeps a `training=None` too.
    options = {} if training is None else {"training": training}
    x = bn(name="explicit")(x, mask=mask, **options)
    return keras.Model(tokens, layers.GlobalAveragePooling1D()(x))


def wrapped(bn=layers.BatchNormalization):
    frames = keras.Input((3, 6, 6, 2))
    frame = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(4, 3), bn(name="in_frame")],
        name="frame",
    )
    x = layers.TimeDistributed(frame, name="each_frame")(frames)
    x = layers.TimeDistributed(layers.Flatten())(x)
    x = layers.TimeDistributed(bn(name="per_step"), name="each_step")(x)
    x = layers.Bidirectional(layers.RNN(NormalizedCell(3, bn)), name="both_ways")(x)
    return keras.Model(frames, x)


@keras.saving.register_keras_serializable(package="keras_bn_tests")
class NormalizedCell(layers.Layer):
    """A recurrent cell with a batch normalization inside."""

    def __init__(self, units, bn=layers.BatchNormalization, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units
        self.dense = layers.Dense(units)
        self.norm = bn(name="cell_norm")

    def build(self, input_shape):
        self.dense.build((None, input_shape[-1] + self.units))
        self.norm.build((None, self.units))

    def call(self, inputs, states, training=None):
        joined = keras.ops.concatenate([inputs, states[0]], -1)
        y = keras.ops.tanh(self.norm(self.dense(joined), training=training))
        return y, [y]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def composite(bn=layers.BatchNormalization):
    """Layers of the user's own, which hold theirs as attributes and in lists."""
    x = keras.Input((6,))
    return keras.Model(x, layers.Dense(2)(Residual(6, bn=bn)(Residual(6, bn=bn)(x))))


class Residual(layers.Layer):
    """A layer that makes some sublayers at once and others when it is built."""

    def __init__(self, units, bn=layers.BatchNormalization, **kwargs):
        super().__init__(**kwargs)
        self.units, self.bn = units, bn
        self.dense = layers.Dense(units)
        self.norms = [bn(), bn()]

    def build(self, input_shape):
        self.dense.build(input_shape)
        for norm in self.norms:
            norm.build(input_shape)
        self.last = self.bn(momentum=0.5)
        self.last.build(input_shape)

    def call(self, inputs):
        x = self.dense(inputs)
        for norm in self.norms:
            x = keras.ops.relu(norm(x))
        return inputs + self.last(x)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class Subclassed(keras.Model):
    """A subclassed model without a build method."""

    def __init__(self, units=4, bn=layers.BatchNormalization, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units)
        self.norms = {"before": bn(name="before"), "after": bn(name="after")}
        self.head = keras.Sequential([layers.Dense(3), bn(name="head_norm")])

    def call(self, inputs):
        x = self.norms["after"](self.dense(self.norms["before"](inputs)))
        return self.head(keras.ops.relu(x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


GRAPHS = [sequential, convolutional, several, nested, masked, wrapped, composite]
