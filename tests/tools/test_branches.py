"""fold where tensors meet: sums of linear branches, and concatenations."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from support.zoo import inputs_of, randomized

import keras_bn
from keras_bn.surgery.graph import walk
from keras_bn.surgery.norms import is_normalization
from keras_bn.tools.compare import relative_difference

pytestmark = pytest.mark.usefixtures("seeded")

VECTOR, LINE, IMAGE, VOLUME = (6,), (9, 6), (9, 8, 6), (5, 6, 4, 4)
ANY = (None, None, 6)
FIRST = {"data_format": "channels_first"}


def bn(name="bn", **options):
    return keras_bn.BatchNormalization(name=name, **options)


def conv(size=3, name=None, filters=6, **options):
    name = name or f"c{size}"
    return layers.Conv2D(filters, size, **{"padding": "same", **options}, name=name)


def depthwise(size, **options):
    options = {"padding": "same", **options}
    return layers.DepthwiseConv2D(size, **options, name=f"d{size}")


def model_of(build, shape=IMAGE):
    """A model with a nonlinear layer before and behind; its variables are random."""
    x = keras.Input(shape)
    outputs = keras.tree.flatten(build(layers.ReLU(name="before")(x)))
    outputs = [layers.ReLU()(y) for y in outputs]
    return randomized(keras.Model(x, outputs if len(outputs) > 1 else outputs[0]))


def check(model, tolerance=1e-5):
    """The plan, and the folded model, which gives the same outputs."""
    before = [v.numpy() for v in model.variables]
    plan, folded = keras_bn.plan_fold(model), keras_bn.fold(model)
    if None in model.input_shape[1:]:
        x = np.random.default_rng(0).normal(size=(3, 7, 8, 6)).astype("float32")
    else:
        x = inputs_of(model)
    for variable, was in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), was)
    outputs = (m(x, training=False) for m in (model, folded))
    assert relative_difference(*outputs) < tolerance
    left = [path for path, layer in walk(folded) if is_normalization(layer)]
    assert left == [fold.layer for fold in plan if fold.into is None]
    return plan, folded


def padded():
    """Branches with strides, of which one pads by a layer of its own."""
    return [
        [layers.ZeroPadding2D(1), conv(strides=2, padding="valid"), bn()],
        [conv(1, strides=2)],
    ]


# Branches, the shape of what they read, and the layer that computes them all.
BRANCHES = {
    "RepVGG": ([[conv(), bn("b3")], [conv(1), bn("b1")], [bn()]], IMAGE, "c3"),
    "biases": (
        [[conv(use_bias=False), bn()], [conv(1)], [conv(1, "other")]],
        IMAGE,
        "c3",
    ),
    "strides": (
        [[conv(strides=2), bn("b3")], [conv(1, strides=2), bn()]],
        IMAGE,
        "c3",
    ),
    "own padding": (padded(), IMAGE, "c3"),
    "valid": (
        [
            [conv(padding="valid"), bn()],
            [layers.Cropping2D(1), conv(1)],
            [conv(padding="valid", name="other"), bn("b")],
        ],
        ANY,
        None,
    ),
    "unknown sizes": ([[conv(5), bn("b5")], [conv(3)], [conv(1)], [bn()]], ANY, "c5"),
    "unknown sizes, strides": (padded(), ANY, "c3"),
    "asymmetric": (
        [[conv((1, 3), "a"), bn("ba")], [conv((3, 1), "b")], [conv(), bn()]],
        IMAGE,
        "c3",
    ),
    "even kernels": ([[conv(4), bn("b4")], [conv(2)], [bn()]], IMAGE, "c4"),
    "dilation": ([[conv(dilation_rate=2), bn("b3")], [conv(1)], [bn()]], IMAGE, "c3"),
    "a dilated kernel in a larger": (
        [[conv(dilation_rate=2), bn()], [conv(5), bn("b5")]],
        IMAGE,
        "c5",
    ),
    "groups": ([[conv(groups=2), bn("b3")], [conv(1, groups=2)], [bn()]], IMAGE, "c3"),
    "narrower groups": (
        [[conv(groups=2), bn("b3")], [conv(1, groups=6, filters=6)], [conv(5, "c")]],
        IMAGE,
        "c",
    ),
    "groups in groups": (
        [[conv(filters=12, groups=3), bn("b3")], [conv(1, groups=6, filters=12)]],
        IMAGE,
        "c3",
    ),
    "depthwise": (
        [[depthwise(5), bn("b5")], [depthwise(3), bn("b3")], [depthwise(1)], [bn()]],
        IMAGE,
        "d5",
    ),
    "depthwise, strides": (
        [[depthwise(3, strides=2), bn("b3")], [depthwise(1, strides=2), bn()]],
        IMAGE,
        "d3",
    ),
    "depthwise on lines": (
        [
            [layers.DepthwiseConv1D(3, padding="same", name="d3"), bn()],
            [layers.DepthwiseConv1D(2, padding="same")],
        ],
        LINE,
        "d3",
    ),
    "depth multiplier": (
        [
            [depthwise(3, depth_multiplier=2, use_bias=False), bn()],
            [depthwise(1, depth_multiplier=2)],
        ],
        IMAGE,
        "d3",
    ),
    "depthwise in a convolution": ([[conv(), bn()], [depthwise(3)]], IMAGE, "c3"),
    "only the tensor": ([[depthwise(3), bn()], [depthwise(1)], []], IMAGE, "d3"),
    "the tensor twice": ([[depthwise(3), bn()], [], []], IMAGE, "d3"),
    "what changes nothing": (
        [
            [layers.Dropout(0.5), conv(), bn("b3")],
            [layers.Identity(), bn(), layers.Activation("linear")],
            [layers.Dropout(0.5)],
        ],
        IMAGE,
        "c3",
    ),
    "several normalizations": (
        [[conv(1), bn("b1"), bn("b2")], [bn(), bn("b3")], [bn("b4")]],
        IMAGE,
        "c1",
    ),
    "Dense": ([[layers.Dense(6, name="d")], [bn()], []], VECTOR, "d"),
    "Dense on images": ([[layers.Dense(6)], [conv()], [bn()]], IMAGE, "c3"),
    "causal": (
        [
            [layers.Conv1D(6, 3, padding="causal", dilation_rate=2, name="c3"), bn()],
            [layers.Conv1D(6, 2, padding="causal", dilation_rate=4)],
            [bn("b")],
        ],
        LINE,
        "c3",
    ),
    "volumes": (
        [
            [layers.Conv3D(4, 3, padding="same", name="c3"), bn("b3")],
            [layers.Conv3D(4, 1)],
            [bn()],
        ],
        VOLUME,
        "c3",
    ),
    "channels first": (
        [
            [conv(filters=9, **FIRST), bn("b3", axis=1)],
            [
                layers.ZeroPadding2D(1, **FIRST),
                conv(2, "b", filters=9, padding="valid", **FIRST),
                layers.Cropping2D(((0, 1), (0, 1)), **FIRST),
            ],
            [bn(axis=1)],
        ],
        IMAGE,
        None,
    ),
    "channels first, one convolution": (
        [
            [conv(filters=9, **FIRST), bn("b3", axis=1)],
            [conv(1, "c1", filters=9, **FIRST)],
            [bn(axis=1)],
        ],
        IMAGE,
        "c3",
    ),
}


def branches(stacks, x, add):
    parts = []
    for stack in stacks:
        y = x
        for layer in stack:
            # A layer of the table is of one test.
            y = type(layer).from_config(layer.get_config())(y)
        parts.append(y)
    return add(parts)


@pytest.mark.parametrize("name", BRANCHES)
def test_a_sum_of_branches_becomes_one_layer(name):
    stacks, shape, into = BRANCHES[name]
    model = model_of(lambda x: branches(stacks, x, layers.Add(name="add")), shape)
    plan, folded = check(model)
    if not into:
        assert not plan.sums
        return
    assert all(plan), str(plan)
    assert [fold.into for fold in plan.sums] == [into]
    others = layers.ZeroPadding2D, layers.Dropout
    kept = [layer for layer in folded.layers if not isinstance(layer, others)]
    assert [la.name for la in kept[1:-1]] == ["before", into]
    weights = [v for v in folded.variables if "seed" not in v.path]
    assert len(weights) == 2


ADDITIONS = {
    "sum": sum,
    "from a float": lambda parts: sum(parts, 0.0),
    "nested": lambda parts: parts[0] + (parts[1] + parts[2]),
}


@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
def test_the_plan_names_what_is_added(add):
    stacks = [[conv(1), bn("b1")], [conv(), bn("b3")], [bn("bn_id")]]
    model = model_of(lambda x: branches(stacks, x, add))
    plan, folded = check(model)
    assert sorted(str(plan).splitlines()) == [
        "b1 -> c1",
        "b3 -> c3",
        "bn_id -> c3",
        "c1 + c3 + bn_id -> c3",
    ]
    assert "c1 + c3 + bn_id" in plan._repr_html_()
    assert "3 of 3 can be folded" in plan._repr_html_()
    assert len(folded.layers) == 4


DIFFERENCES = {
    "c3 - c1 - bn_id": lambda a, b, c: a - b - c,
    "c3 - c1 + bn_id": lambda a, b, c: a - layers.Subtract()([b, c]),
    "c1 - c3 - bn_id": lambda a, b, c: b - a - c,
    "- c3 + c1 - bn_id": lambda a, b, c: 0.0 - (a - b) - c,
}


@pytest.mark.parametrize("terms", DIFFERENCES)
def test_differences(terms):
    stacks = [[conv(), bn("b3")], [conv(1), bn("b1")], [bn("bn_id")]]
    difference = DIFFERENCES[terms]
    model = model_of(
        lambda x: bn("behind")(branches(stacks, x, lambda parts: difference(*parts)))
    )
    plan, folded = check(model)
    whole = terms[0] != "-"  # it subtracts from a number: no sum of tensors
    assert all(fold.into for fold in plan) is whole
    if whole:
        (fold,) = plan.sums
        ours, theirs = (sorted(f"+ {t}".split(" ")[1::2]) for t in (fold.layer, terms))
        assert ours == theirs
        assert fold.layer.count("-") == terms.count("-")
        assert len(folded.layers) == 4


def test_the_whole_is_added_to_another_tensor():
    def build(x):
        y = layers.Conv2D(6, 1, activation="relu")(x)
        return layers.Add()([branches([[conv(), bn("b3")], [bn()]], x, sum), y])

    plan, _ = check(model_of(build))
    assert [str(fold) for fold in plan] == ["b3 -> c3", "bn -> c3"]


def test_a_normalization_behind_a_sum_or_before_its_branches():
    stacks = [[conv(padding="valid")], [conv(padding="valid", name="other"), bn("b")]]
    plan, folded = check(
        model_of(lambda x: bn()(branches(stacks, bn("first")(x), layers.Add())))
    )
    assert {fold.layer: fold.into for fold in plan} == {
        "first": "c3",
        "b": "other",
        "bn": "c3",
    }
    assert len(folded.layers) == 4


def test_what_a_sum_no_longer_needs_reads_nothing():
    def build(x):
        x = bn("first")(x)
        y = layers.Dropout(0.5)(conv(1, "a")(layers.Dropout(0.5)(x)))
        return bn("behind")(layers.Add()([conv(1, "b")(x), y]))

    plan, _ = check(model_of(build))
    assert [fold.into for fold in plan] == ["b", "b"]


def test_a_sum_without_normalization_stays():
    model = model_of(lambda x: layers.Add()([conv()(x), x]))
    plan, folded = check(model)
    assert not plan.sums
    assert len(folded.layers) == len(model.layers)


def test_blocks_of_a_class_of_their_own():
    class Block(layers.Layer):
        def __init__(self, name):
            super().__init__(name=name)
            self.paths = [
                keras.Sequential([conv(n), bn(f"b{n}")], name=f"p{n}") for n in (1, 3)
            ]
            self.skip = bn("skip")

        def call(self, x):
            y = layers.Add()([self.paths[0](x), self.paths[1](x)])  # made anew
            return ops.relu(y + self.skip(x))

    plan, folded = check(model_of(lambda x: Block("two")(Block("one")(x))))
    assert [str(each) for each in plan.sums] == [
        f"{block}/p1/c1 + {block}/p3/c3 + {block}/skip -> {block}/p3/c3"
        for block in ("one", "two")
    ]
    assert len(folded.variables) == 4


def test_a_sum_beside_a_block_of_a_class_of_its_own():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(name="inside"), bn("bn_inside")

        def call(self, x, training=False):
            return ops.relu(self.bn(self.conv(x), training=training))

    def build(x):
        return branches([[conv(), bn()], [bn("skip")]], Block()(x), layers.Add())

    plan, _ = check(model_of(build))
    assert [fold.into.split("/")[-1] for fold in plan] == ["inside", "c3", "c3"]


def test_parts_inside_of_models():
    def build(x):
        inner = keras.Sequential([keras.Input(x.shape[1:]), conv(1), bn("b1")])
        other = keras.Sequential([keras.Input(x.shape[1:]), conv()], name="other")
        y = bn("behind")(layers.Add()([inner(x), other(x), bn()(x)]))
        return keras.Sequential([keras.Input(y.shape[1:]), bn("inside"), conv(2)])(y)

    plan, folded = check(model_of(build))
    assert {fold.layer.split("/")[-1]: fold.into for fold in plan} == {
        "b1": f"{plan[0].layer.split('/')[0]}/c1",
        "bn": "other/c3",
        "behind": "other/c3",
        "inside": "other/c3",
    }
    assert len(folded.layers) == 5


def test_a_part_with_the_input_of_the_model():
    x = keras.Input(IMAGE)
    part = keras.Model(x, conv(1)(bn("inside")(x)), name="part")
    plan, _ = check(randomized(keras.Model(x, bn("behind")(part(x)))))
    assert [fold.into for fold in plan] == ["part/c1", "part/c1"]
    y = layers.Add()([bn()(x), part(conv(1, "first")(x))])
    plan, _ = check(randomized(keras.Model(x, y)))
    assert [fold.layer for fold in plan if fold.into] == ["part/inside"]


def test_a_mask_is_kept():
    def build(x):
        y = layers.Masking(0.0)(x)
        y = layers.Dense(6)(y) + bn()(y)  # which has no mask
        return layers.GlobalAveragePooling1D()(y)

    (fold,), _ = check(model_of(build, LINE))
    assert "has not the mask of the sum" in fold.reason


def shared(x):
    layer = conv(name="shared")
    return layer(layers.ReLU()(layers.Add(name="add")([layer(x), bn()(x)])))


def read_by_another(x):
    y = conv(1)(x)
    return layers.Add(name="add")([conv()(x), y, bn()(x)]), layers.Softmax(name="s")(y)


def output(x):
    y = conv(1)(x)
    model = keras.Model(x, y, name="model")
    return layers.Add(name="add")([model(x), bn()(x)]), model(x)


def other_dtype(x):
    half = conv(dtype="mixed_float16")(x)
    return layers.Add(name="add")([half, bn()(x)])


def other_input(x):
    return layers.Add(name="add")([conv()(layers.ReLU(name="r")(x)), bn()(x)])


def repeated(x):
    y = layers.GlobalAveragePooling2D(keepdims=True)(x)
    return layers.Add(name="add")([bn()(y), conv(1)(y), x])


def in_training(x):
    return layers.Add(name="add")([conv()(x), bn()(x, training=True)])


def other_sizes(x):
    y = conv(4, strides=2)(x)
    return layers.Add(name="add")([y, bn()(x)[:, ::2, ::2]])


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (shared, "'shared' is shared: it is called in 2 places"),
        (read_by_another, "'s' also uses the output of 'c1'"),
        (other_dtype, "'c3' in 'add' computes in float16, not in float32"),
        (other_input, "'add' adds 'bn', which is not linear in what its other parts"),
        (repeated, "'add' after it is of type Add, which `fold` does not go"),
        (in_training, "it is called with `training`"),
        ([[conv()], [bn(), layers.ReLU(name="r")]], "'r' after it is not linear"),
        ([[conv(), layers.ReLU(name="r")], [bn()]], "'add' adds 'r', which is not lin"),
        ([[conv(activation="relu")], [bn()]], "'c3' in 'add' has the activation relu"),
        ([[bn()], []], "in 'add', no part has a kernel"),
        (
            [[layers.SeparableConv2D(6, 3, padding="same", name="s")], [bn()]],
            "in 'add', 's' is of type SeparableConv2D, which `fold` does not add",
        ),
        (
            [[conv(padding="valid"), layers.ZeroPadding2D(1, name="z")], [bn()]],
            "'add' adds 'z', which is not linear in what",
        ),
        (
            [[conv((1, 3), "a")], [conv((3, 1), "b")], [bn()]],
            "in 'add', 'b' reads places that 'a' does not",
        ),
        (
            [
                [conv(strides=2, padding="valid")],
                [bn(), layers.Cropping2D(((2, 3), (2, 3)))],
            ],
            "",
        ),
        ([[conv(dilation_rate=2)], [conv(name="b")], [bn()]], "'b' reads places that"),
    ],
)
def test_what_stays_has_a_true_reason(build, reason):
    def whole(x):
        return branches(build, x, layers.Add(name="add"))

    (fold,), _ = check(model_of(build if callable(build) else whole))
    assert fold.into is None
    assert reason in fold.reason


def test_strides_and_sizes_that_are_not_known():
    def build(x):
        parts = conv(strides=2)(x), bn("b1")(conv(1, strides=2)(x))
        return layers.Add(name="add")(parts)

    plan, _ = check(model_of(build, ANY))
    assert not plan.sums


def test_other_strides_for_one_size():
    """Of a picture of one row and one column, strides do not show in the shape."""

    def build(x):
        return layers.Add(name="add")([conv(strides=2)(x), bn("b1")(conv(1)(x))])

    plan, _ = check(model_of(build, (1, 1, 6)))
    assert not plan.sums


PARTS = {
    "convolutions": lambda x: [conv(1, "a", 3)(x), layers.Dense(2, name="b")(x)],
    "layers between": lambda x: [
        layers.AveragePooling2D(3, 1, "same")(conv(1, "a", 3)(x)),
        layers.Dropout(0.5)(layers.Dense(2, name="b")(x)),
    ],
    "a concatenation in it": lambda x: [
        conv(1, "a", 3)(x),
        layers.Concatenate()([layers.Dense(2, name="b")(x), bn("b2")(conv(1, "c")(x))]),
    ],
}


@pytest.mark.parametrize("join", [layers.concatenate, ops.concatenate])
@pytest.mark.parametrize("name", PARTS)
def test_each_part_of_a_concatenation_takes_its_slice(name, join):
    plan, _ = check(model_of(lambda x: bn()(join(PARTS[name](x), axis=-1))))
    into = {fold.layer: fold.into for fold in plan}
    assert into.pop("bn") == ("a, b, c" if "b2" in into else "a, b")


def test_a_concatenation_along_other_axes_and_a_sum():
    def build(x):
        y = layers.Concatenate(axis=2)([conv(name="a")(x), conv(2, "b")(x)])
        y = bn("rows")(y)
        z = layers.ReLU()(y)
        return bn("sum")(layers.Add()([conv(name="c")(z), conv(name="d")(y)]))

    plan, _ = check(model_of(build))
    assert {f.layer: f.into for f in plan} == {"rows": "a, b", "sum": "c, d"}


def test_into_the_layer_behind_a_concatenation():
    def build(x):
        y = layers.Dense(3, activation="tanh")(x)
        return layers.Dense(4, name="d")(layers.Concatenate()([bn()(x), y]))

    (fold,), _ = check(model_of(build, VECTOR))
    assert fold.into == "d"


def test_parts_of_a_concatenation_that_become_one():
    def build(x):
        y = bn("first")(x)
        return layers.Dense(4, name="d")(layers.Concatenate()([bn("again")(y), y]))

    plan, _ = check(model_of(build, VECTOR))
    assert {fold.layer: fold.into for fold in plan} == {"first": "d", "again": "d"}


def one_twice(x):
    y = conv(name="a")(x)
    return bn()(
        layers.Concatenate(name="join")([y, layers.Dropout(0.5, name="drop")(y)])
    )


def one_not_linear(x):
    return bn()(layers.Concatenate(name="join")([conv()(x), layers.ReLU(name="r")(x)]))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (one_twice, "'drop' also uses the output of 'a'"),
        (one_not_linear, "'r' before it is not linear"),
        (
            lambda x: bn()(layers.Concatenate()([conv(name="a")(x)] * 2)),
            "parts of a sum or concatenation before it are one",
        ),
        (
            lambda x: bn(axis=[2, 3])(layers.Concatenate(name="j")([conv()(x), x])),
            "'j' before it concatenates along axis 3 alone",
        ),
        (
            lambda x: conv(1)(layers.Concatenate(2, name="j")([bn()(x), x])),
            "'j' after it concatenates along axis 2",
        ),
    ],
)
def test_what_stays_at_a_concatenation(build, reason):
    (fold,), _ = check(model_of(build))
    assert fold.into is None
    assert reason in fold.reason


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    dtype = keras.dtype_policies.DTypePolicy(policy)

    def build(x):
        stacks = [[conv(dtype=dtype), bn("b3", dtype=dtype)], [bn(dtype=dtype)]]
        x = layers.ReLU(dtype=dtype)(branches(stacks, x, layers.Add(dtype=dtype)))
        parts = [conv(1, name, dtype=dtype)(x) for name in "ab"]
        return bn("join", dtype=dtype)(layers.Concatenate(dtype=dtype)(parts))

    tolerance = 3e-2 if policy == "mixed_float16" else 0.2
    plan, folded = check(model_of(build), tolerance)
    assert [fold.into for fold in plan if fold.layer != "join"] == ["c3", "c3"]
    assert {fold.layer: fold.into for fold in plan}["join"] == "a, b"
    assert {v.dtype for v in folded.variables} == {"float32"}
