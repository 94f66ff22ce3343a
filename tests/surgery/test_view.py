"""What a view of a model says, and how often tools read a model."""

import sys

import keras
import numpy as np
import pytest
from keras import layers
from support.backend import only
from support.zoo import inputs_of, randomized

import keras_bn
from keras_bn.surgery import graph
from keras_bn.surgery.view import ModelView
from keras_bn.tools.compare import relative_difference

pytestmark = pytest.mark.usefixtures("seeded")


def part():
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(image)
    x = layers.ReLU(name="relu")(keras_bn.BatchNormalization(name="bn")(x))
    return keras.Model(image, layers.GlobalMaxPooling2D(name="pool")(x), name="part")


def whole():
    image = keras.Input((8, 8, 3))
    base = part()
    x = layers.Add(name="add")([base(image), base(image)])
    return keras.Model(image, layers.Dense(2, name="head")(x), name="whole")


def test_layers_calls_and_who_makes_and_reads_what():
    model = whole()
    view = ModelView(model)
    paths = [path for path, _ in view.layers]
    assert paths[0] == "whole"
    assert {"part", "part/conv", "part/bn", "head"} < set(paths)
    assert list(view.normalizations) == ["part/bn"]
    assert view.path(model.get_layer("head")) == "head"
    assert view.path(keras.ops.abs) is None
    inner = model.get_layer("part")
    conv, relu = inner.get_layer("conv"), inner.get_layer("relu")
    assert view.producer(conv.output).operation is conv
    (reader,) = view.consumers(relu.output)
    assert reader.operation is inner.get_layer("pool")
    assert view.next(view.producer(relu.output)) is reader
    assert view.producer(inner.input) is None
    assert view.is_output(inner.output)
    assert not view.is_output(relu.output)
    assert view.called_once(conv)
    assert view.places(inner) == 2
    assert view.graphs == [model, inner]


class Feature(keras.Model):
    """A model, and another of its tensors, which alone is called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.base = part()
        relu = self.base.get_layer("relu")
        self.features = keras.Model(self.base.inputs, relu.output)

    def call(self, inputs):
        return self.features(inputs)


def pyramid():
    """A backbone as an attribute, and a model of several of its levels."""
    image = x = keras.Input((16, 16, 3))
    levels = []
    for name in "a", "b", "c":
        x = layers.Conv2D(4, 3, strides=2, padding="same", name=f"conv_{name}")(x)
        x = keras_bn.BatchNormalization(name=f"bn_{name}")(x)
        x = layers.ReLU(name=f"relu_{name}")(x)
        levels.append(x)
    backbone = keras.Model(image, x, name="backbone")
    features = keras.Model(backbone.inputs, levels[1:], name="features")
    outputs = [layers.Dense(2)(level) for level in features(image)]
    model = keras.Model(image, outputs)
    model.backbone = backbone
    return model


def subclassed():
    model = Feature()
    model(np.zeros((1, 8, 8, 3), "float32"))
    return model


def in_sequential():
    base = part()
    features = keras.Model(base.input, base.get_layer("relu").output)
    model = keras.Sequential([keras.Input((8, 8, 3)), features, layers.Flatten()])
    model.base = base
    return model


@pytest.mark.parametrize(
    ("make", "count"), [(subclassed, 1), (pyramid, 3), (in_sequential, 1)]
)
def test_a_layer_in_two_graphs_is_called_in_one_place(make, count):
    model = randomized(make())
    plan = keras_bn.plan_fold(model)
    assert [fold.into is None for fold in plan] == [False] * count, str(plan)
    folded = keras_bn.fold(model)
    assert not ModelView(folded).normalizations
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype("float32")
    x = x if make is pyramid else x[:, :8, :8]
    assert relative_difference(model(x), folded(x)) < 1e-5


@pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 13),
    reason="a Functional model of this Keras does not know models in its attributes",
)
def test_a_tensor_that_another_graph_takes_is_not_folded():
    base = part()
    model = keras.Model(base.input, base.output)
    model.before = keras.Model(base.input, base.get_layer("conv").output)
    (fold,) = keras_bn.plan_fold(randomized(model))
    assert "'conv' before it is an output" in fold.reason


def walks(function, *arguments, **options):
    """How often a call of a function goes through all layers of some model."""
    count = 0

    def profile(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code is graph.walk.__code__

    sys.setprofile(profile)
    try:
        function(*arguments, **options)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    ("tool", "most"),
    [
        (keras_bn.plan_fold, 1),
        (keras_bn.fold, 2),
        (keras_bn.freeze, 1),
        (lambda model: keras_bn.freeze(model, fuse=True), 1),
        (keras_bn.unfreeze, 1),
        (keras_bn.to_keras, 2),
        (keras_bn.from_keras, 3),  # once more for what its file will hold
    ],
)
def test_tools_go_through_a_model_a_few_times(tool, most):
    assert walks(tool, randomized(part())) == most


@only("tensorflow", "its converter writes the files")
@pytest.mark.parametrize("mended", [False, True])
def test_export_goes_through_a_model_three_times(mended, tmp_path):
    model = randomized(part())
    options = {"equalize": mended, "correct_bias": mended}
    count = walks(
        keras_bn.export_int8, model, tmp_path / "a.tflite", inputs_of(model), **options
    )
    assert count == 3


class Averaged(keras.Model):
    """A network and a copy of it for averaged weights, as in diffusion models."""

    def __init__(self):
        super().__init__(name="averaged")
        inputs = keras.Input((3,))
        y = keras_bn.BatchNormalization(name="bn")(inputs)
        self.network = keras.Model(inputs, y, name="net")
        self.average = keras.models.clone_model(self.network)
        self.last = layers.Dense(3, name="net_1")

    def call(self, x):
        return self.last(self.average(self.network(x)))


def test_layers_of_one_name_side_by_side_have_paths_of_their_own():
    model = Averaged()
    model(np.ones((2, 3), "float32"))
    assert model.network.name == model.average.name
    view = ModelView(model)
    assert view.path(model.average) == "net_2"
    assert view.path(model.last) == "net_1"
    assert keras_bn.freeze(model) == ["net/bn", "net_2/bn"]
    assert all(net.get_layer("bn").freeze_statistics for net in model.layers[:2])
    keras_bn.unfreeze(model)
    x = np.random.default_rng(0).normal(2, 3, size=(256, 3)).astype("float32")
    keras_bn.recalibrate(model, x)
    found = keras_bn.statistics(model, x)
    assert list(found) == ["net/bn", "net_2/bn"]
    norms = [net.get_layer("bn") for net in model.layers[:2]]
    for path, norm in zip(found, norms, strict=True):
        mean = keras.ops.convert_to_numpy(norm.moving_mean)
        np.testing.assert_allclose(mean, found[path].mean, atol=1e-4)
    assert [str(f).split()[0] for f in keras_bn.plan_fold(model)] == list(found)
