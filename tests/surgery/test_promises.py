"""A change of a model that does not do what it promises is an error, and undone."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_bn
from keras_bn.surgery.exchange import bypass, exchange
from keras_bn.surgery.graph import nodes, walk
from keras_bn.surgery.insert import insert
from keras_bn.surgery.norms import is_keras
from keras_bn.surgery.promises import BrokenPromiseError
from keras_bn.surgery.rebuild import rebuild
from keras_bn.surgery.view import ModelView


def chain():
    inputs = keras.Input((3,))
    x = layers.Dense(3, name="dense")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    return keras.Model(inputs, layers.ReLU(name="relu")(x), name="chain")


class Stubborn(layers.Layer):
    """A layer that holds a normalization where nothing can be put in its place."""

    def __init__(self, **options):
        super().__init__(**options)
        norm = layers.BatchNormalization(name="bn")
        norm.build((None, 3))
        vars(self)["norm"] = lambda: norm

    _layers = property(lambda self: [self.norm()], lambda self, value: None)

    def call(self, inputs):
        return self.norm()(inputs)


def state(model):
    """What a change would change: the layers that are held, and what is computed."""
    x = np.linspace(-1.0, 1.0, 6).reshape(2, 3)
    held = [
        [id(layer) for layer in holder._tracker.config["layers"][1]]
        for holder in ModelView(model).holders
    ]
    graphs = [
        each for each in ModelView(model).holders if hasattr(each, "_nodes_by_depth")
    ]
    calls = [[id(call.operation) for call in nodes(graph)] for graph in graphs]
    return held, calls, keras.ops.convert_to_numpy(model(x)).tolist()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_layer_that_stays_is_an_error_and_the_model_as_before(in_place):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.BatchNormalization(name="first"),
            Stubborn(name="stubborn"),
        ]
    )
    before = state(model)
    with pytest.raises(BrokenPromiseError, match="Your model has not changed"):
        keras_bn.from_keras(model, in_place=in_place)
    norms = [layer for _, layer in walk(model) if is_keras(layer)]
    pairs = [(norm, rebuild(norm, keras_bn.BatchNormalization)) for norm in norms]
    with pytest.raises(BrokenPromiseError, match="'bn' is still in the model"):
        exchange(pairs, ModelView(model).holders)
    assert state(model) == before
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 3)), verbose=0)


def test_a_layer_that_no_one_holds_is_an_error():
    model, other = chain(), layers.ReLU(name="other")
    before = state(model)
    with pytest.raises(BrokenPromiseError, match="'other' was to be replaced"):
        exchange(
            [(model.get_layer("relu"), layers.ReLU(name="new")), (other, chain())],
            ModelView(model).holders,
        )
    assert state(model) == before


def test_a_bypass_that_leaves_the_layer_is_an_error():
    class Two(layers.Layer):
        def call(self, inputs):
            return inputs, inputs

    inputs = keras.Input((3,))
    _, second = Two(name="two")(inputs)
    model = keras.Model(inputs, layers.ReLU()(second))
    with pytest.raises(BrokenPromiseError, match="'two' was to be taken out"):
        bypass(ModelView(model), [model.get_layer("two")])


def test_a_layer_that_was_not_inserted_is_an_error():
    with pytest.raises(BrokenPromiseError, match="'new' was to be inserted"):
        insert(ModelView(chain()), [(chain().outputs[0], [layers.ReLU(name="new")])])


def test_an_output_that_is_cut_off_is_an_error():
    model, other = chain(), chain()
    model.outputs[:] = other.outputs
    with pytest.raises(BrokenPromiseError, match="The calls in 'chain' are not those"):
        exchange([(model.get_layer("bn"), layers.ReLU())], ModelView(model).holders)
