"""Bad input is refused early, in words that name the argument, rule and value."""

import json
import re

import numpy as np
import pytest
from support import backend
from support.steps import array

from keras_bn import BatchNormalization
from keras_bn.layer.arguments import OPTIONS


def refuses(message, error=ValueError):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis": 1.5}, "`axis` must be an int or a list of ints. Received: axis=1.5"),
        ({"axis": "1"}, "`axis` must be an int or a list of ints. Received: axis='1'"),
        (
            {"axis": True},
            "`axis` must be an int or a list of ints. Received: axis=True",
        ),
        (
            {"axis": None},
            "`axis` must be an int or a list of ints. Received: axis=None",
        ),
        ({"axis": []}, "`axis` must name at least one axis. Received: axis=[]"),
        ({"axis": [1, 1]}, "`axis` must not repeat an axis. Received: axis=[1, 1]"),
        (
            {"momentum": 1.5},
            "`momentum` must be between 0 and 1. Received: momentum=1.5",
        ),
        (
            {"momentum": -0.1},
            "`momentum` must be between 0 and 1. Received: momentum=-0.1",
        ),
        (
            {"momentum": float("nan")},
            "`momentum` must be between 0 and 1. Received: momentum=nan",
        ),
        (
            {"epsilon": -1},
            "`epsilon` must be a finite number, 0 or greater. Received: epsilon=-1",
        ),
        (
            {"epsilon": float("inf")},
            "`epsilon` must be a finite number, 0 or greater. Received: epsilon=inf",
        ),
        (
            {"epsilon": float("nan")},
            "`epsilon` must be a finite number, 0 or greater. Received: epsilon=nan",
        ),
    ],
)
def test_at_construction(arguments, message):
    with refuses(message):
        BatchNormalization(**arguments)


# Values of a wrong kind, for each option.
WRONG = {
    "axis": ["x", None, {}, [None], [[1]], 1.5],
    "momentum": ["x", "0.5", [0.5, 0.5], {}, b"1", lambda n: n, object()],
    "epsilon": [None, "x", "1e-3", [], np.zeros(2), 1j],
    "renorm_momentum": [None, "x", [], 2, float("nan")],
    "renorm_clipping": ["x", 3, [1.0], {"rmax": "x"}, {"rmax": float("nan")}],
    "virtual_batch_size": ["x", 1.5, [], -2, True],
    "freeze_affine": ["x", None, 2, [], np.array(["gamma", "beta"])],
    "adapt_prior": ["x", [], -1, float("inf"), 1j],
    "adapt_memory": ["x", [], 1.5, {}],
    "freeze_statistics": ["x", 2, []],
}
FLAGS = "center scale renorm synchronized unbiased debias"
WRONG |= {name: ["x", "True", 2, [], np.zeros(2), 0.5] for name in FLAGS.split()}
WRONG |= {
    name: ["x", 3, [1.0]]
    for name in OPTIONS
    if name.endswith(("_initializer", "_regularizer", "_constraint"))
}


def test_each_option_has_wrong_values():
    assert WRONG.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("built", [False, True])
def test_values_of_a_wrong_kind_at_construction_and_later(name, built):
    layer = BatchNormalization(renorm=name.startswith("renorm_"))
    if built:
        layer.build((None, 4))
    before = layer.get_config()
    for value in WRONG[name]:
        message = re.escape(f"{name}={value!r}")
        pattern = rf"^`{name}` must be [^.].*\. Received: {message}$"
        with pytest.raises(ValueError, match=pattern):
            BatchNormalization(**{name: value})
        with pytest.raises(ValueError, match=pattern):
            setattr(layer, name, value)
    assert layer.get_config() == before


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"axis": np.int64(1)}, {"axis": 1}),
        ({"axis": np.array([1, 2])}, {"axis": [1, 2]}),
        ({"axis": np.array(2)}, {"axis": 2}),
        ({"axis": [np.int8(1), -1.0]}, {"axis": [1, -1]}),
        ({"axis": -1.0}, {"axis": -1}),
        ({"axis": np.float32(2)}, {"axis": 2}),
        ({"momentum": np.float32(0.5)}, {"momentum": 0.5}),
        ({"epsilon": np.array(0.25)}, {"epsilon": 0.25}),
        ({"center": np.bool_(False)}, {"center": False}),
        ({"scale": np.bool_(False)}, {"scale": False}),
        ({"center": np.array(False)}, {"center": False}),
        ({"virtual_batch_size": np.int64(8)}, {"virtual_batch_size": 8}),
        ({"virtual_batch_size": np.uint8(8)}, {"virtual_batch_size": 8}),
        ({"freeze_affine": np.bool_(True)}, {"freeze_affine": True}),
        ({"freeze_statistics": np.bool_(True)}, {"freeze_statistics": True}),
        ({"debias": np.bool_(True)}, {"debias": True}),
        ({"unbiased": np.True_}, {"unbiased": True}),
        ({"synchronized": np.bool_(False)}, {"synchronized": False}),
        ({"renorm": np.bool_(True)}, {"renorm": True}),
        ({"renorm_momentum": np.float64(0.5)}, {"renorm_momentum": 0.5}),
        (
            {"renorm": True, "renorm_clipping": {"rmax": np.float32(3)}},
            {"renorm": True, "renorm_clipping": {"rmax": 3.0}},
        ),
    ],
    ids=str,
)
def test_numbers_of_numpy_are_numbers(given, meant):
    """They build, train, and are written as plain numbers."""
    x = np.random.default_rng(0).normal(size=(8, 3, 2)).astype("float32")
    layers = [BatchNormalization(name="bn", **options) for options in (given, meant)]
    one, other = (array(layer(x, training=True)) for layer in layers)
    np.testing.assert_array_equal(one, other)
    one, other = (json.dumps(layer.get_config()) for layer in layers)
    assert one == other


@pytest.mark.parametrize(
    "arguments",
    [
        {"axis": np.array([1.5])},
        {"axis": np.bool_(True)},
        {"axis": np.array([], int)},
        {"axis": float("nan")},
        {"axis": float("inf")},
        {"virtual_batch_size": np.int64(0)},
        {"virtual_batch_size": np.bool_(True)},
        {"freeze_affine": np.int64(2)},
        {"momentum": np.float32(1.5)},
    ],
    ids=str,
)
def test_numbers_of_numpy_that_are_out_of_range(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"^`{name}` must "):
        BatchNormalization(**arguments)


def test_the_ends_of_the_ranges_are_accepted():
    layer = BatchNormalization(axis=np.int64(1), momentum=0, epsilon=0)
    assert (layer.axis, layer.momentum, layer.epsilon) == (1, 0.0, 0.0)
    assert BatchNormalization(momentum=1).momentum == 1.0


@pytest.mark.parametrize(
    ("axis", "shape", "message"),
    [
        (
            4,
            (None, 3),
            "`axis` must be between -2 and 1 for inputs of shape (None, 3). "
            "Received: axis=4",
        ),
        (
            [1, -5],
            (2, 3, 4),
            "`axis` must be between -3 and 2 for inputs of shape (2, 3, 4). "
            "Received: axis=[1, -5]",
        ),
        (
            [2, -1],
            (2, 3, 4),
            "`axis` must not repeat an axis of inputs of shape (2, 3, 4). "
            "Received: axis=[2, -1]",
        ),
        (
            [0, 1],
            (2, 3),
            "`axis` must leave an axis to take statistics over in inputs of shape "
            "(2, 3). Received: axis=[0, 1]",
        ),
        (
            -1,
            (4, None),
            "The size of the channel axis must be known. Received: axis=-1, "
            "input shape (4, None)",
        ),
        (
            -1,
            (),
            "BatchNormalization needs inputs of rank 2 or more, "
            "(batch, ..., channels). Received: input shape ()",
        ),
        (
            -1,
            (5,),
            "BatchNormalization needs inputs of rank 2 or more, "
            "(batch, ..., channels). Received: input shape (5,)",
        ),
    ],
)
def test_at_build(axis, shape, message):
    with refuses(message):
        BatchNormalization(axis=axis).build(shape)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_low_rank_inputs(shape):
    with pytest.raises(ValueError, match="needs inputs of rank 2 or more"):
        BatchNormalization()(np.zeros(shape, "float32"))


def test_an_axis_out_of_range_in_compute_output_shape():
    with refuses(
        "`axis` must be between -2 and 1 for inputs of shape (2, 3). Received: axis=5"
    ):
        BatchNormalization(axis=5).compute_output_shape((2, 3))


@pytest.mark.parametrize(
    ("axis", "mask", "message"),
    [
        (
            -1,
            (4,),
            "The mask must have the shape of the inputs' leading axes, (4, 5), "
            "for inputs of shape (4, 5, 3) with the channels on axis 2. "
            "Received: mask of shape (4,)",
        ),
        (
            -1,
            (4, 5, 3),
            "The mask must have the shape of the inputs' leading axes, (4, 5), "
            "for inputs of shape (4, 5, 3) with the channels on axis 2. "
            "Received: mask of shape (4, 5, 3)",
        ),
        (
            1,
            (4, 6),
            "The mask must have the shape of the inputs' leading axes, (4, 5), "
            "or (4, 3), theirs without the channels, "
            "for inputs of shape (4, 5, 3) with the channels on axis 1. "
            "Received: mask of shape (4, 6)",
        ),
        (
            [1, 2],
            (5,),
            "The mask must have the shape of the inputs' leading axes, (4, 5), "
            "or (4,), theirs without the channels, "
            "for inputs of shape (4, 5, 3) with the channels on axis [1, 2]. "
            "Received: mask of shape (5,)",
        ),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_masks_of_the_wrong_shape(axis, mask, message, training):
    layer = BatchNormalization(axis=axis)
    layer.build((4, 5, 3))
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(
            np.zeros((4, 5, 3), "float32"), mask=np.ones(mask, bool), training=training
        )


def test_inputs_that_are_strings():
    tf = backend.tensorflow("it alone has strings")
    refuses_input(tf.constant([["a", "b"]]), "string")


def test_inputs_that_are_complex():
    refuses_input(backend.tensor(np.array([[1 + 2j, 3.0]], "complex64")), "complex64")


def refuses_input(inputs, dtype):
    message = f"Inputs must be real numbers. Received: inputs of dtype {dtype}"
    with pytest.raises(TypeError, match=re.escape(message)):
        BatchNormalization()(inputs)


def test_weights_of_the_wrong_shape():
    layer = BatchNormalization(name="bn")
    layer.build((None, 3))
    with refuses(
        "Layer bn weight shape (3,) is not compatible with provided weight shape (4,)."
    ):
        layer.set_weights([np.ones(4)] * 4)
    with pytest.raises(ValueError, match="weight list of length 2, but the layer was"):
        layer.set_weights([np.ones(3)] * 2)


def test_inputs_of_another_shape_than_built_for():
    layer = BatchNormalization(name="bn")
    layer.build((None, 3))
    with pytest.raises(
        ValueError, match="expected axis -1 of input shape to have value"
    ):
        layer(np.zeros((2, 4), "float32"))
    with pytest.raises(ValueError, match="expected ndim=2, found ndim=3"):
        layer(np.zeros((2, 2, 3), "float32"))


def test_the_layer_says_that_it_is_not_of_keras():
    norm = BatchNormalization(name="bn")
    words = "<keras_bn.BatchNormalization name=bn, built=False>"
    assert repr(norm) == str(norm) == words

    class Own(BatchNormalization):
        pass

    assert repr(Own(name="own")).startswith("<Own name=own")
