"""What fold goes through, before and after a normalization; what it cannot pass."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from support.zoo import inputs_of, randomized

import keras_bn
from keras_bn.tools import commute
from keras_bn.tools.compare import relative_difference

pytestmark = pytest.mark.usefixtures("seeded")

LINE, IMAGE, VOLUME = (8, 4), (8, 8, 4), (4, 4, 4, 3)
FIRST = "channels_first"

# Layers that a scale and a shift go through, with the shape of their input.
THROUGH = {
    "ActivityRegularization": (layers.ActivityRegularization(l2=0.1), LINE),
    "AlphaDropout": (layers.AlphaDropout(0.5), LINE),
    "Dropout": (layers.Dropout(0.5), IMAGE),
    "GaussianDropout": (layers.GaussianDropout(0.5), LINE),
    "GaussianNoise": (layers.GaussianNoise(1.0), LINE),
    "Identity": (layers.Identity(), LINE),
    "SpatialDropout1D": (layers.SpatialDropout1D(0.5), LINE),
    "SpatialDropout2D": (layers.SpatialDropout2D(0.5), IMAGE),
    "SpatialDropout3D": (layers.SpatialDropout3D(0.5), VOLUME),
    "Activation": (layers.Activation("linear"), LINE),
    "AveragePooling1D": (layers.AveragePooling1D(3), LINE),
    "AveragePooling2D": (layers.AveragePooling2D(2), IMAGE),
    "AveragePooling2D, same": (layers.AveragePooling2D(3, 2, "same"), IMAGE),
    "AveragePooling3D": (layers.AveragePooling3D(2), VOLUME),
    "Cropping1D": (layers.Cropping1D(1), LINE),
    "Cropping2D": (layers.Cropping2D(((1, 0), (0, 2))), IMAGE),
    "Cropping3D": (layers.Cropping3D(1), VOLUME),
    "GlobalAveragePooling1D": (layers.GlobalAveragePooling1D(), LINE),
    "GlobalAveragePooling2D": (layers.GlobalAveragePooling2D(), IMAGE),
    "kept dimensions": (layers.GlobalAveragePooling2D(keepdims=True), IMAGE),
    "GlobalAveragePooling3D": (layers.GlobalAveragePooling3D(), VOLUME),
    "GlobalMaxPooling1D": (layers.GlobalMaxPooling1D(), LINE),
    "GlobalMaxPooling2D": (layers.GlobalMaxPooling2D(), IMAGE),
    "GlobalMaxPooling3D": (layers.GlobalMaxPooling3D(), VOLUME),
    "MaxPooling1D": (layers.MaxPooling1D(2), LINE),
    "MaxPooling2D": (layers.MaxPooling2D(3, 2, "same"), IMAGE),
    "MaxPooling3D": (layers.MaxPooling3D(2), VOLUME),
    "UpSampling1D": (layers.UpSampling1D(2), LINE),
    "UpSampling2D": (layers.UpSampling2D(2), IMAGE),
    "UpSampling3D": (layers.UpSampling3D(2), VOLUME),
    "Reshape": (layers.Reshape((2, 4, 4)), LINE),
    "Reshape, rest": (layers.Reshape((-1, 4)), IMAGE),
    "Permute": (layers.Permute((2, 1, 3)), IMAGE),
}
# After a normalization it spreads the channels; before one, it would have to bring
# values of one channel back together.
FLATTENED = {
    "Flatten": (layers.Flatten(), IMAGE),
    "Reshape": (layers.Reshape((-1,)), LINE),
}


def positive(model):
    """The model with gammas that are greater than zero."""
    for layer in model.layers:
        if isinstance(layer, keras_bn.BatchNormalization):
            layer.gamma.assign(abs(layer.gamma.numpy()) + 0.1)
    return model


def folds(layer, shape, stack):
    layer = type(layer).from_config(layer.get_config())
    stack = [layer if each is None else each for each in stack]
    model = positive(randomized(keras.Sequential([keras.Input(shape), *stack])))
    folded = keras_bn.fold(model)
    x = inputs_of(model)
    assert relative_difference(model(x, training=False), folded(x)) < 1e-5
    (fold,) = keras_bn.plan_fold(model)
    assert len(model.layers) - len(folded.layers) == (fold.into is not None)
    return fold


def bn(**options):
    return keras_bn.BatchNormalization(name="bn", **options)


@pytest.mark.parametrize("name", THROUGH)
def test_from_behind_a_layer_into_the_one_before_it(name):
    layer, shape = THROUGH[name]
    fold = folds(layer, shape, [layers.Dense(shape[-1], name="dense"), None, bn()])
    assert fold.into == "dense", fold.reason


@pytest.mark.parametrize("name", [*THROUGH, *FLATTENED])
def test_from_before_a_layer_into_the_one_behind_it(name):
    layer, shape = {**THROUGH, **FLATTENED}[name]
    stack = [layers.ReLU(), bn(), None, layers.Dense(3, name="dense")]
    assert folds(layer, shape, stack).into == "dense"


@pytest.mark.parametrize(
    "layer",
    [
        layers.AveragePooling2D(2, data_format=FIRST),
        layers.Cropping2D(1, data_format=FIRST),
        layers.GlobalAveragePooling2D(data_format=FIRST),
        layers.UpSampling2D(2, data_format=FIRST),
        layers.Flatten(data_format=FIRST),
        layers.SpatialDropout2D(0.5, data_format=FIRST),
        layers.Reshape((3, 32)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_channels_on_the_first_axis(layer):
    stack = [layers.ReLU(), bn(axis=1), None]
    if len(layer.compute_output_shape((None, 3, 4, 8))) > 2:
        stack.append(layers.Flatten())
    fold = folds(layer, (3, 4, 8), [*stack, layers.Dense(2, name="dense")])
    assert fold.into == "dense", fold.reason


def test_every_layer_of_the_table_is_tested():
    padding = {"ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D", "Flatten"}
    names = {kind.__name__ for kind in commute._TABLE}
    assert names - padding <= set(THROUGH)


OPERATIONS = {
    "Reshape": ((4, 8, 3), lambda x: ops.reshape(x, (-1, 32, 3))),
    "Transpose": ((4, 8, 3), lambda x: ops.transpose(x, (0, 2, 1, 3))),
    "Swapaxes": ((4, 8, 3), lambda x: ops.swapaxes(x, 1, 2)),
    "Moveaxis": ((4, 8, 3), lambda x: ops.moveaxis(x, 1, 2)),
    "ExpandDims": ((4, 3), lambda x: ops.expand_dims(x, 1)),
    "Squeeze": ((1, 4, 3), lambda x: ops.squeeze(x, 1)),
}


def around(shape, operation):
    """A normalization before an operation, and a Dense behind it."""
    x = keras.Input(shape)
    y = operation(bn()(layers.ReLU()(x)))
    return randomized(keras.Model(x, layers.Dense(2, name="dense")(y)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    model = around(*OPERATIONS[name])
    (fold,) = keras_bn.plan_fold(model)
    assert fold.into == "dense", fold.reason
    x = inputs_of(model)
    outputs = (m(x, training=False) for m in (model, keras_bn.fold(model)))
    assert relative_difference(*outputs) < 1e-5
    assert set(commute._OPERATIONS) == set(OPERATIONS)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: ops.reshape(x, (-1, 8, 3)), "moves values between samples"),
        (lambda x: ops.transpose(x, (1, 0, 2, 3)), "has a shape that is not known"),
        (lambda x: ops.reshape(x, (-1, 3, 4, 8)), "the channels on one axis"),
        (lambda x: ops.exp(x), "of type Exp, which `fold` does not go through"),
    ],
)
def test_what_stays_at_an_operation_has_a_true_reason(operation, reason):
    (fold,) = keras_bn.plan_fold(around((4, 8, 3), operation))
    assert reason in fold.reason


def test_several_layers_and_normalizations_in_a_row():
    model = keras.Sequential(
        [
            keras.Input(IMAGE),
            layers.Conv2D(6, 3, name="conv"),
            layers.Dropout(0.5),
            keras_bn.BatchNormalization(),
            layers.AveragePooling2D(2),
            keras_bn.BatchNormalization(),
            layers.ReLU(),
            keras_bn.BatchNormalization(),
            layers.Flatten(),
            layers.GaussianNoise(0.1),
            layers.Dense(3, name="dense"),
            layers.Identity(),
            keras_bn.BatchNormalization(),
        ]
    )
    model = randomized(model)
    plan = keras_bn.plan_fold(model)
    assert [fold.into for fold in plan] == ["conv", "conv", "dense", "dense"]
    x = inputs_of(model)
    assert relative_difference(model(x), keras_bn.fold(model)(x)) < 1e-5


def test_padding_passes_a_scale_without_a_shift():
    options = {"center": False, "momentum": 0.9}
    stack = [layers.ReLU(), bn(**options), None, layers.Conv2D(3, 3, name="conv")]
    model = keras.Sequential(
        [keras.Input(IMAGE), *(each or layers.ZeroPadding2D(1) for each in stack)]
    )
    norm = randomized(model).get_layer("bn")
    norm.moving_mean.assign(keras.ops.zeros(4))
    (fold,) = keras_bn.plan_fold(model)
    assert fold.into == "conv"
    x = inputs_of(model)
    assert relative_difference(model(x), keras_bn.fold(model)(x)) < 1e-5


class Own(layers.Dropout):
    """A subclass may compute anything."""


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (layers.ReLU(name="x"), "'x' before it is not linear"),
        (layers.Activation("tanh", name="x"), "'x' before it is not linear"),
        (layers.LeakyReLU(name="x"), "'x' before it is not linear"),
        (layers.ZeroPadding2D(name="x"), "have to pad with the shift"),
        (layers.Flatten(name="x"), "'x' before it does not keep the channels on one"),
        (
            layers.TimeDistributed(layers.Dense(4), name="x"),
            "'x' before it is of type TimeDistributed, which `fold`",
        ),
        (
            layers.LayerNormalization(name="x"),
            "'x' before it is of type LayerNormalization, which `fold`",
        ),
        (
            Own(0.5, name="x"),
            "'x' before it is of type Own, which `fold`",
        ),
        (
            layers.UpSampling2D(interpolation="bilinear", name="x"),
            "'x' before it interpolates (bilinear)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stays_has_a_true_reason(layer, reason):
    fold = folds(layer, IMAGE, [layers.Dense(4, name="dense"), None, bn()])
    assert fold.into is None
    assert reason in fold.reason


def graph(build):
    x = keras.Input(IMAGE)
    return randomized(keras.Model(x, build(x)))


def multiplied(x):
    dense = layers.Dense(4, name="dense")(x)
    return bn()(layers.Multiply(name="product")([dense, x]))


def training(x):
    return bn()(layers.Dropout(0.5, name="drop")(layers.Dense(4)(x), training=True))


def read_twice(x):
    y = layers.Dropout(0.5, name="drop")(layers.Dense(4, name="dense")(x))
    return bn()(y), layers.ReLU(name="relu")(y)


def read_before(x):
    y = layers.Dense(4, name="dense")(x)
    return bn()(layers.Dropout(0.5)(y)), layers.ReLU(name="relu")(y)


def output_between(x):
    y = layers.Dropout(0.5, name="drop")(layers.Dense(4)(x))
    return bn()(y), y


def into_a_model(x):
    inner = keras.Sequential([keras.Input(IMAGE), layers.Dense(4)], name="inner")
    return inner(bn()(layers.ReLU()(inner(x))))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (multiplied, "'product' before it is of type Multiply, which `fold`"),
        (training, "'drop' before it is called with `training`"),
        (read_twice, "'relu' also uses the output of 'drop'"),
        (read_before, "'relu' also uses the output of 'dense'"),
        (output_between, "'drop' before it is an output of the model"),
        (into_a_model, "'inner' after it is a model of its own"),
    ],
)
def test_what_stays_in_a_graph_has_a_true_reason(build, reason):
    model = graph(build)
    (fold,) = keras_bn.plan_fold(model)
    assert fold.into is None
    assert reason in fold.reason


def test_a_negative_scale_does_not_pass_a_maximum():
    model = graph(lambda x: bn()(layers.MaxPooling2D(name="x")(layers.Dense(4)(x))))
    model.get_layer("bn").gamma.assign([1.0, -1.0, 1.0, 1.0])
    (fold,) = keras_bn.plan_fold(model)
    assert "'x' before it takes the largest value, and a scale is neg" in fold.reason
    model.get_layer("bn").gamma.assign([1.0, 0.0, 1.0, 1.0])
    assert keras_bn.plan_fold(model)[0].into
    x = inputs_of(model)
    assert relative_difference(model(x), keras_bn.fold(model)(x)) < 1e-5


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            layers.MaxPooling2D(2, name="x"),
            "takes the largest value, and a scale may become negative",
        ),
        (
            layers.ZeroPadding2D(1, name="x"),
            "pads with zeros, which a shift would change",
        ),
        (layers.Flatten(name="x"), "does not keep the channels on one axis"),
        (layers.ReLU(name="x"), "is not linear"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fused_freezing_gives_a_true_reason(layer, reason):
    layer = type(layer).from_config(layer.get_config())
    stack = [keras.Input(IMAGE), layers.Dense(4, name="dense"), layer, bn()]
    (fold,) = keras_bn.freeze(keras.Sequential(stack), fuse=True)
    assert f"'x' before it {reason}" in fold.reason


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    dtype = keras.dtype_policies.DTypePolicy(policy)
    stack = [
        layers.Dense(4, dtype=dtype, name="dense"),
        layers.AveragePooling2D(2, dtype=dtype),
        keras_bn.BatchNormalization(dtype=dtype),
    ]
    model = randomized(keras.Sequential([keras.Input(IMAGE), *stack]))
    folded = keras_bn.fold(model)
    assert len(folded.layers) == 2
    x = inputs_of(model)
    assert relative_difference(model(x), folded(x)) < 3e-2
    np.testing.assert_array_equal(folded.layers[0].kernel.dtype, "float32")
