"""Models and layers of classes that make their own layers, as KerasHub's are."""

import keras
from keras import layers

register = keras.saving.register_keras_serializable("support")


@register
class Net(keras.Model):
    """A graph that the constructor makes."""

    def __init__(self, units=4, **kwargs):
        inputs = keras.Input((6, 3))
        x = layers.Dense(units, use_bias=False, name="first")(inputs)
        x = layers.BatchNormalization(name="bn")(x)
        x = layers.ReLU(name="relu")(x)
        outputs = layers.Dense(2, name="last")(x)
        super().__init__(inputs, outputs, **kwargs)
        self.units = units

    def get_config(self):
        return {"units": self.units, "name": self.name}


@register
class Dicts(keras.Model):
    """Tensors in dicts, and layers among the attributes, without names."""

    def __init__(self, units=4, **kwargs):
        dense = layers.Dense(units)
        norms = [layers.BatchNormalization(momentum=0.5) for _ in range(2)]
        inputs = {"x": keras.Input((6, 3), name="x")}
        x = norms[0](dense(inputs["x"]))
        y = norms[1](layers.Conv1D(3, 3, padding="same")(x))
        super().__init__(inputs=inputs, outputs={"x": x, "y": y}, **kwargs)
        self.units, self.dense, self.norms = units, dense, norms

    def get_config(self):
        return {"units": self.units}


@register
class Task(keras.Model):
    """A graph around such a model, which its config holds."""

    def __init__(self, base, **kwargs):
        inputs = base.input
        outputs = layers.Dense(2)(layers.BatchNormalization()(base(inputs)))
        super().__init__(inputs, outputs, **kwargs)
        self.base = base

    def get_config(self):
        return {"base": keras.saving.serialize_keras_object(self.base)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["base"]))


@register
class Stack(keras.Sequential):
    def __init__(self, units=4, **kwargs):
        parts = [layers.Dense(units), layers.BatchNormalization(), layers.ReLU()]
        super().__init__([keras.Input((6, 3)), *parts, layers.Dense(2)], **kwargs)
        self.units = units

    def get_config(self):
        return {"units": self.units}

    @classmethod
    def from_config(cls, config):
        return cls(config["units"])


@register
class Block(layers.Layer):
    """A layer with others in it, in a plain graph."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units)
        self.norm = layers.BatchNormalization()

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build(self.dense.compute_output_shape(shape))

    def call(self, x):
        return self.norm(self.dense(x))

    def get_config(self):
        return {**super().get_config(), "units": self.dense.units}


@register
class Pyramid(layers.Layer):
    """A layer that makes models in `build`, and adds a tuple to its shape.

    With `closed`, it computes with a variable of its own, so that it cannot be opened.
    """

    def __init__(self, closed=False, **kwargs):
        super().__init__(**kwargs)
        self.closed = closed

    def build(self, shape):
        norms = [layers.BatchNormalization(name=f"norm_{i}") for i in range(2)]
        self.parallel = [keras.Sequential([layers.Dense(4, name="a"), norms[0]])]
        self.parallel[0].build(shape)
        self.projection = keras.Sequential([layers.Dense(3, name="b"), norms[1]])
        self.projection.build(shape[:-1] + (4,))  # noqa: RUF005
        if self.closed:
            self.scale = self.add_weight(shape=(3,), initializer="ones")

    def call(self, x):
        y = self.projection(self.parallel[0](x))
        return y * self.scale if self.closed else y

    def get_config(self):
        return {**super().get_config(), "closed": self.closed}


@register
class Calling(keras.Model):
    """A model with a `call`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block, self.head = Block(), layers.Dense(2)

    def build(self, shape):
        self.block.build(shape)
        self.head.build((*shape[:-1], 4))

    def call(self, x):
        return self.head(self.block(x))


def with_a_block():
    inputs = keras.Input((6, 3))
    x = layers.BatchNormalization(name="in_config")(Block()(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))


def calling():
    model = Calling()
    model.build((None, 6, 3))
    return model


def task():
    return Task(Net())


# Of graphs alone, and all.
GRAPHS = [Net, Dicts, task, Stack]
ALL = [*GRAPHS, with_a_block, calling]
