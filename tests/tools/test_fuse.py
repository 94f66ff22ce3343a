"""freeze(model, fuse=True): one computation, and everything else as it was."""

import collections
import contextlib
import copy
import gc
import pickle
import re

import keras
import numpy as np
import pytest
from keras import layers
from support.backend import COMPILED, NAME, array, but_on, tensor, tf, training_step
from support.distributed import strategy_of
from support.marks import mostly_slow, slow
from support.training import Loop
from support.zoo import inputs_of, nested, randomized, several, wrapped

import keras_bn
from keras_bn.layer import fusion
from keras_bn.surgery.copying import copy_model
from keras_bn.tools import fuse

OURS = keras_bn.BatchNormalization
# Run op by op, as on PyTorch, no layer follows a note: the other way has been computed.
FUSES = NAME != "torch"


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Fuse small layers too."""
    monkeypatch.setattr(fusion, "WORTH", 0)


# The linear layers, each with the shape of its input and the channel axis after it.
KINDS = {
    "Dense": (lambda: layers.Dense(4), (3,), -1),
    "Dense without bias": (lambda: layers.Dense(4, use_bias=False), (5, 3), -1),
    "EinsumDense": (
        lambda: layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d"),
        (5, 3),
        -1,
    ),
    "EinsumDense, heads": (
        lambda: layers.EinsumDense("abc,chd->abhd", (None, 2, 4), bias_axes="hd"),
        (5, 3),
        2,
    ),
    "EinsumDense, ellipsis": (
        lambda: layers.EinsumDense("...c,cd->...d", (4,)),
        (5, 3),
        -1,
    ),
    "Conv1D, causal": (
        lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2),
        (9, 3),
        -1,
    ),
    "Conv2D": (
        lambda: layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False),
        (7, 7, 3),
        -1,
    ),
    "Conv3D": (lambda: layers.Conv3D(4, 2), (4, 4, 4, 2), -1),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(4, 3, 2), (5, 3), -1),
    "Conv2DTranspose": (
        lambda: layers.Conv2DTranspose(4, 3, 2, padding="same"),
        (5, 5, 3),
        -1,
    ),
    "Conv3DTranspose": (
        lambda: layers.Conv3DTranspose(3, 2, use_bias=False),
        (3, 3, 3, 2),
        -1,
    ),
    "DepthwiseConv1D": (
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=2),
        (7, 3),
        -1,
    ),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False),
        (7, 7, 3),
        -1,
    ),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(4, 3), (7, 3), -1),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(4, 3, padding="same", use_bias=False),
        (7, 7, 3),
        -1,
    ),
    "Conv2D, grouped": (lambda: layers.Conv2D(6, 3, groups=2), (7, 7, 4), -1),
    # Of another width than it has filters: else Keras 3.15.1 adds the bias to columns.
    "Conv1D, channels first": (
        lambda: layers.Conv1D(4, 3, data_format="channels_first"),
        (3, 9),
        1,
    ),
    "Conv2D, channels first": (
        lambda: layers.Conv2D(4, 3, data_format="channels_first"),
        (3, 7, 8),
        1,
    ),
    "Conv2DTranspose, channels first": (
        lambda: layers.Conv2DTranspose(4, 3, 2, data_format="channels_first"),
        (3, 5, 4),
        1,
    ),
}


def model_of(kind, **options):
    """A linear layer and a normalization, with weights as if trained."""
    make, shape, axis = KINDS[kind]
    keras.utils.set_random_seed(0)
    x = keras.Input(shape)
    y = OURS(axis, name="bn", **options)(make()(x))
    return randomized(keras.Model(x, layers.Flatten()(y)))


def pair_of(model, **options):
    """Two copies of a model, one frozen, the other fused as well."""
    frozen, fused = copy_model(model)[0], copy_model(model)[0]
    keras_bn.freeze(frozen)
    return frozen, fused, keras_bn.freeze(fused, fuse=True, **options)


@contextlib.contextmanager
def policy(name):
    """Layers made meanwhile have this dtype policy."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy(name)
    keras.config.set_floatx("float64" if name == "float64" else "float32")
    yield
    keras.config.set_dtype_policy(before[0])
    keras.config.set_floatx(before[1])


@pytest.fixture
def float64():
    with policy("float64"):
        yield


def gradients(model, x, upstream, mode):
    """The output, and the gradients of the input and of every variable that trains.

    In training, then in inference: a list of arrays.
    """
    results = []
    for training in True, False:
        step = training_step(
            lambda x, training=training: model(x, training=training),
            model.variables,
            mode,
        )
        y, found = step(tensor(x), tensor(upstream))
        results += [y, *found]
    return [array(value) for value in results]


def upstream_of(model, x):
    shape = (len(x), *model.output_shape[1:])
    if None in shape:
        shape = model(x).shape
    return np.random.default_rng(3).normal(size=shape)


@pytest.mark.parametrize(
    "kind", mostly_slow(KINDS, ["Dense", "Conv2D", "DepthwiseConv2D"])
)
def test_outputs_and_gradients_are_those_of_the_unfused_layers(kind, float64):
    model = model_of(kind)
    x = inputs_of(model)
    upstream = upstream_of(model, x)
    frozen, fused, (told,) = pair_of(model)
    assert told.into == model.layers[1].name
    asked = []
    again = fuse.Deferring._run
    # On a CPU, TensorFlow has gradients of channels first under XLA alone.
    alone = NAME == "tensorflow" and "channels first" in kind
    mode = "xla" if alone else COMPILED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse.Deferring, "_run", lambda *a: asked.append(a) or again(*a))
        expected = gradients(frozen, x, upstream, mode)
        found = gradients(fused, x, upstream, mode)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    assert len(asked) == (2 if FUSES else 0)


@pytest.mark.skipif(NAME != "tensorflow", reason="of graphs of TensorFlow")
def test_a_tape_outside_of_the_graph_finds_the_same_gradients(float64):
    """It asks the graph for its gradients, op by op, and not what tapes recorded."""
    model = model_of("Conv2D")
    x = inputs_of(model)
    upstream = tensor(upstream_of(model, x))
    found = []
    for each in pair_of(model)[:2]:
        graph = tf.function(each, autograph=False)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(graph(tensor(x), training=True) * upstream)
        found.append(tape.gradient(loss, each.trainable_weights))
    assert len(found[0]) == 3
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def chain():
    """Convolutions with every neighbour that matters, and their data."""
    keras.utils.set_random_seed(1)
    x = image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, use_bias=False, name="conv")(x)
    x = OURS(name="bn")(x)
    x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = OURS(name="bn_depthwise", momentum=0.9)(x)
    x = OURS(name="bn_again", scale=False)(x)
    x = layers.ReLU(name="relu")(x)
    x = OURS(name="bn_alone")(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(3, name="dense")(x)
    model = randomized(keras.Model(image, OURS(name="bn_dense")(x)))
    rng = np.random.default_rng(2)
    return model, (rng.normal(size=(16, 8, 8, 3)), rng.normal(size=(16, 3)))


TOLD = [
    "bn -> conv",
    "bn_depthwise -> depthwise",
    "bn_again -> depthwise",
    "bn_alone stays: 'relu' before it is not linear",
    "bn_dense -> dense",
]


def test_it_tells_what_plan_fold_tells():
    model, _ = chain()
    assert [str(each) for each in keras_bn.freeze(model, fuse=True)] == TOLD
    assert all(la.freeze_statistics for la in model.layers if isinstance(la, OURS))
    again = keras_bn.freeze(model, fuse=True)
    assert [str(each) for each in again] == TOLD


def trained(model, data, steps=20, **options):
    """The weights after some steps with an optimizer that has state."""
    model.compile(keras.optimizers.Adam(0.01), "mse", **options)
    batch = len(data[0]) // 2
    model.fit(*data, batch, epochs=steps // 2, shuffle=False, verbose=0)
    return [v.numpy() for v in (*model.weights, *model.optimizer.variables)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(
            lambda: chain(),
            {"steps_per_execution": 2},
            marks=but_on("torch", "Keras refuses it there"),
        ),
        pytest.param(
            lambda: (both(), (ROWS, TARGETS)),
            {"jit_compile": True},
            marks=[pytest.mark.slow, but_on("torch", "it needs a C++ compiler")],
        ),
        slow(lambda: (both(), (ROWS, TARGETS)), {"run_eagerly": True}),
    ],
)
def test_twenty_steps_end_at_the_same_weights(make, options, float64):
    model, data = make()
    frozen, fused, _ = pair_of(model)
    expected = trained(frozen, data, **options)
    for a, b in zip(trained(fused, data, **options), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    if not options.get("jit_compile"):  # which takes long to compile
        losses = [each.evaluate(*data, verbose=0) for each in (fused, frozen)]
        np.testing.assert_allclose(*losses, rtol=1e-9)


def test_it_computes_one_convolution_and_no_product_of_full_size():
    model, (x, _) = chain()
    frozen, fused, _ = pair_of(model)
    counts = [reachable_ops(each, x) for each in (frozen, fused)]
    for each in counts:
        assert (each["Conv2D"], each["DepthwiseConv2dNative"]) == (1, 1)
    # Each normalization multiplies the images; the one that stays still does.
    assert [each["Mul of images"] for each in counts] == [4, 1]


def reachable_ops(model, x):
    """How often each kind of op is computed for the output in inference."""
    x = tf.constant(x, "float32")
    graph = tf.function(model, autograph=False).get_concrete_function(x)
    waiting, seen, counts = [t.op for t in graph.outputs], set(), collections.Counter()
    while waiting:
        op = waiting.pop()
        if op.name in seen:
            continue
        seen.add(op.name)
        images = op.outputs and op.outputs[0].shape.rank == 4
        full = images and op.type == "Mul" and op.outputs[0].shape[0] == len(x)
        counts["Mul of images" if full else op.type] += 1
        waiting += [t.op for t in op.inputs]
    return counts


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_half_precision(name):
    with policy(name):
        model, (x, _) = chain()
    frozen, fused, told = pair_of(model)
    assert sum(each.into is not None for each in told) == 4
    frozen_y, fused_y = (each.predict(x, verbose=0) for each in (frozen, fused))
    tolerance = 0.05 if "bfloat16" in name else 0.01
    # NumPy 1.26 compares no bfloat16 with other numbers.
    pair = (y.astype("float32") for y in (fused_y, frozen_y))
    np.testing.assert_allclose(*pair, rtol=tolerance, atol=tolerance)
    assert fused_y.dtype == frozen_y.dtype


@but_on("torch", "nothing is fused there")
def test_factors_are_rounded_once_in_half_precision():
    layer = layers.Dense(64, use_bias=False, dtype="mixed_float16")
    x = keras.Input((64,), dtype="float16")
    model = keras.Model(x, OURS(dtype="mixed_float16")(layer(x)))
    randomized(model)
    keras_bn.freeze(model, fuse=True)
    found = model.predict(np.eye(64, dtype="float16"), verbose=0)
    norm = model.layers[-1]
    gamma, beta, mean, variance = (v.numpy() for v in norm.weights)
    scale = gamma / np.sqrt(variance + norm.epsilon)
    kernel = (layer.kernel.numpy() * scale).astype("float16")
    expected = kernel + (beta - mean * scale).astype("float16")
    np.testing.assert_array_equal(found, expected)


def test_replicas(float64):
    strategy = strategy_of("mirrored 2")
    ends = []
    for fuse_too in (False, True):
        with strategy.scope():
            model = both()
            model.compile(keras.optimizers.SGD(0.05, momentum=0.9))
        keras_bn.freeze(model, fuse=fuse_too)
        loop = Loop(strategy, model, (3, 5))
        for number in range(4):
            loop.step(number)
        ends.append([v.numpy() for v in model.weights])
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def small():
    """Dense, normalization, Dense for the rows of `support.training`."""
    keras.utils.set_random_seed(0)
    parts = [keras.Input((6,)), layers.Dense(5, name="dense"), OURS(name="bn")]
    return randomized(keras.Sequential([*parts, layers.Dense(1, name="head")]))


def both():
    """A convolution and a Dense layer with their normalizations, for the same rows."""
    keras.utils.set_random_seed(0)
    stack = [
        keras.Input((6,)),
        layers.Reshape((2, 3, 1)),
        layers.Conv2D(4, 2, name="conv"),
        OURS(name="bn"),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(5, name="dense"),
        OURS(name="bn_dense"),
        layers.Dense(1, name="head"),
    ]
    return randomized(keras.Sequential(stack))


def asked(model, x):
    """The names of the linear layers that `predict` computes with other weights."""
    names = []
    again = fuse.Deferring._run

    def spy(self, *args):
        names.append(self.layer.name)
        return again(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse.Deferring, "_run", spy)
        if isinstance(model, keras.Model):
            model.make_predict_function(force=True)
        model.predict(x, verbose=0)
    return names


def fused_into(*names):
    """What `asked` gives where `names` are fused."""
    return list(names) if FUSES else []


ROWS = np.random.default_rng(0).normal(size=(8, 6))
TARGETS = np.random.default_rng(1).normal(size=(8, 1))


@pytest.mark.slow
def test_variables_files_and_optimizer_are_those_of_the_unfused_model(tmp_path):
    model = small()
    frozen, fused, _ = pair_of(model)
    y = np.ones((8, 1))
    for each in (frozen, fused):
        each.compile(keras.optimizers.Adam(name="adam"), "mse")
        each.fit(ROWS, y, verbose=0)
    for attribute in ("variables", "trainable_variables"):
        a, b = (getattr(each, attribute) for each in (frozen, fused))
        assert [v.path for v in a] == [v.path for v in b]
    paths = [[v.path for v in each.optimizer.variables] for each in (frozen, fused)]
    assert paths[0] == paths[1]
    assert frozen.get_config() == fused.get_config()
    assert frozen.get_compile_config() == fused.get_compile_config()
    expected = fused.predict(ROWS, verbose=0)
    for ending in ("keras", "weights.h5", "h5"):
        path = tmp_path / f"model.{ending}"
        if ending == "weights.h5":
            fused.save_weights(path)
            again = small()
            again.load_weights(path)
            keras_bn.freeze(again)
        else:
            fused.save(path)
            again = keras.saving.load_model(path, compile=False)
        assert keras_bn.freeze(again) == []
        assert asked(again, ROWS) == []
        np.testing.assert_allclose(again.predict(ROWS, verbose=0), expected, 1e-5)
    assert asked(fused, ROWS) == fused_into("dense")


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), keras.models.clone_model],
)
def test_copies_by_config_are_frozen_and_not_fused(way):
    model = small()
    keras_bn.freeze(model, fuse=True)
    again = way(model)
    assert keras_bn.freeze(again) == []
    assert asked(again, ROWS) == []
    assert asked(model, ROWS) == fused_into("dense")


def test_copies_of_live_objects_are_fused_by_themselves():
    model = small()
    keras_bn.freeze(model, fuse=True)
    for again in copy_model(model)[0], keras_bn.from_keras(model):
        assert asked(again, ROWS) == fused_into("dense")
        before = model.predict(ROWS, verbose=0)
        again.get_layer("dense").kernel.assign(np.zeros((6, 5)))
        assert np.ptp(again.predict(ROWS, verbose=0)) == 0
        np.testing.assert_array_equal(model.predict(ROWS, verbose=0), before)


def test_what_is_assigned_to_a_variable_counts():
    model = small()
    keras_bn.freeze(model, fuse=True)
    assert asked(model, ROWS) == fused_into("dense")
    rng = np.random.default_rng(5)
    for variable in model.variables:
        variable.assign(rng.uniform(0.5, 2.0, variable.shape))
        np.testing.assert_allclose(
            model.predict(ROWS, verbose=0),
            array(model(ROWS, training=False)),
            1e-5,
            1e-5,
        )


def test_unfreeze_goes_back():
    model = small()
    reference = copy_model(model)[0]
    assert keras_bn.freeze(model, fuse=True)[0].into == "dense"
    assert asked(model, ROWS) == fused_into("dense")
    assert keras_bn.unfreeze(model) == ["bn"]
    assert asked(model, ROWS) == []
    assert all("call" not in vars(layer) for layer in model.layers)
    for each in (model, reference):
        each.compile("sgd", "mse")
        each.fit(ROWS, np.ones((8, 1)), shuffle=False, verbose=0)
    for a, b in zip(model.weights, reference.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    keras_bn.freeze(model)
    assert asked(model, ROWS) == []


@pytest.mark.parametrize("by_tool", [True, False])
def test_one_layer_of_them_is_unfrozen_during_fit(by_tool):
    model = both()
    keras_bn.freeze(model, fuse=True)
    norm = model.get_layer("bn")
    model.compile("sgd", "mse")
    before = {la.name: la.moving_mean.numpy() for la in model.layers if "bn" in la.name}

    class Unfreeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1 and by_tool:
                assert keras_bn.unfreeze(norm) == ["bn"]
            elif epoch == 1:
                norm.freeze_statistics = False

    model.fit(ROWS, TARGETS, epochs=2, verbose=0, callbacks=[Unfreeze()])
    moved = {
        name
        for name, value in before.items()
        if not np.array_equal(value, model.get_layer(name).moving_mean.numpy())
    }
    assert moved == {"bn"}
    assert asked(model, ROWS) == fused_into("dense")
    norm.freeze_statistics = True
    assert "conv" not in asked(model, ROWS)
    keras_bn.freeze(model, fuse=True)
    assert ("conv" in asked(model, ROWS)) == FUSES


def test_tools_work_on_a_fused_model():
    model, data = chain()
    frozen, fused, _ = pair_of(model)
    folded = keras_bn.fold(fused)
    assert not any("call" in vars(layer) for layer in folded.layers)
    np.testing.assert_allclose(
        folded.predict(data[0], verbose=0),
        frozen.predict(data[0], verbose=0),
        rtol=1e-4,
        atol=1e-4,
    )
    moments = [
        keras_bn.recalibrate(each, data[0], include_frozen=True, verbose=0, prior=3)
        for each in (frozen, fused)
    ]
    assert moments[0].keys() == moments[1].keys()
    for a, b in zip(frozen.weights, fused.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    reports = [keras_bn.diagnose(each, data[0]).to_dict() for each in (frozen, fused)]
    assert reports[0] == reports[1]
    assert asked(fused, data[0]) == fused_into(
        "conv", "depthwise", "depthwise", "dense"
    )
    np.testing.assert_allclose(
        fused.predict(data[0], verbose=0),
        frozen.predict(data[0], verbose=0),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_keras_gets_layers_as_its_classes_make_them(in_place, fused):
    model = small()
    keras_bn.freeze(model, fuse=True)
    expected = model.predict(ROWS, verbose=0)
    assert asked(model, ROWS) == fused_into("dense")
    # A layer that is unfrozen by its attribute leaves the layer before it noting.
    model.get_layer("bn").freeze_statistics = fused
    told = pytest.warns(UserWarning, match="no longer train")
    with told if fused else contextlib.nullcontext():
        theirs = keras_bn.to_keras(model, in_place=in_place)
    assert theirs.get_layer("bn").trainable is not fused
    assert not any("call" in vars(layer) for layer in theirs.layers)
    assert asked(theirs, ROWS) == []
    still_fused = fused and not in_place
    assert asked(model, ROWS) == fused_into("dense") * still_fused
    np.testing.assert_allclose(theirs.predict(ROWS, verbose=0), expected, 1e-5)


def test_a_refused_conversion_leaves_what_is_fused():
    class WithMore(OURS):
        def build(self, input_shape):
            super().build(input_shape)
            self.extra = self.add_weight(shape=(), name="extra")

    parts = [keras.Input((6,)), layers.Dense(5, name="dense"), WithMore(name="bn")]
    model = keras.Sequential(parts)
    keras_bn.freeze(model, fuse=True)
    assert asked(model, ROWS) == fused_into("dense")
    with pytest.raises(ValueError, match="has the weights extra"):
        keras_bn.to_keras(model, in_place=True)
    assert asked(model, ROWS) == fused_into("dense")


@pytest.mark.parametrize("make", [nested, several, wrapped])
@pytest.mark.filterwarnings("ignore:.*are layers of Keras")
def test_whole_models_are_as_right_as_frozen(make):
    model = randomized(make(OURS))
    frozen, fused, _ = pair_of(model)
    x = inputs_of(model)
    for a, b in zip(
        *(keras.tree.flatten(each.predict(x, verbose=0)) for each in (frozen, fused)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)


def test_layers_used_elsewhere_give_their_own_output():
    model, data = chain()
    frozen, fused, _ = pair_of(model)
    outputs = []
    for each in (frozen, fused):
        inner = [each.get_layer(name).output for name in ("conv", "bn", "relu")]
        features = keras.Model(each.input, inner)
        other = keras.Input((8, 8, 3))
        alone = keras.Model(other, each.get_layer("conv")(other))
        norm_alone = keras.Sequential([keras.Input((6, 6, 4)), each.get_layer("bn")])
        outputs.append(
            [
                *features.predict(data[0], verbose=0),
                alone.predict(data[0], verbose=0),
                norm_alone.predict(
                    data[0][..., :1].repeat(4, -1)[:, 2:, 2:], verbose=0
                ),
            ]
        )
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)


def shared_by_two(conv, x, other):
    return layers.add([OURS(name="bn")(conv(x)), OURS(name="bn_2")(conv(other))])


def two_normalizations_of_one_output(conv, x, other):
    y = conv(layers.add([x, other]))
    return layers.add([OURS(name="bn")(y), OURS(name="bn_2", axis=1)(y)])


def skip_around_the_normalization(conv, x, other):
    y = conv(layers.add([x, other]))
    return layers.add([OURS(name="bn")(y), y])


def output_of_the_model(conv, x, other):
    y = conv(layers.add([x, other]))
    return [OURS(name="bn")(y), y]


def one_normalization_of_two(conv, x, other):
    bn = OURS(name="bn")
    second = layers.Conv2D(4, 3, name="second")
    return layers.add([bn(conv(x)), bn(second(other))])


SHARED = {
    shared_by_two: "'conv' is shared: it is called in 2 places",
    two_normalizations_of_one_output: "also uses the output of 'conv'",
    skip_around_the_normalization: "'add.*' also uses the output of 'conv'",
    output_of_the_model: "'conv' before it is an output of the model",
    one_normalization_of_two: "it is shared: it is called in 2 places",
}


@pytest.mark.parametrize("make", SHARED, ids=lambda make: make.__name__)
def test_what_others_use_is_not_fused(make):
    keras.utils.set_random_seed(0)
    x, other = keras.Input((6, 6, 2)), keras.Input((6, 6, 2))
    conv = layers.Conv2D(4, 3, name="conv")
    model = randomized(keras.Model([x, other], make(conv, x, other)))
    frozen, fused, told = pair_of(model)
    assert told
    for each in told:
        assert each.into is None
        assert re.search(SHARED[make], each.reason)
    data = inputs_of(model)
    assert not any("call" in vars(layer) for layer in fused.layers)
    assert asked(fused, data) == []
    for training in True, False:
        for a, b in zip(
            *(
                keras.tree.flatten(each(data, training=training))
                for each in (fused, frozen)
            ),
            strict=True,
        ):
            np.testing.assert_array_equal(array(a), array(b))


def test_a_normalization_along_other_axes_does_not_follow():
    conv = layers.Conv1D(4, 1, name="conv")
    x = keras.Input((4, 3))
    fused = keras.Model(x, OURS(name="bn")(conv(x)))
    y = keras.Input((4, 3))
    other = keras.Model(y, OURS(axis=1, name="other")(conv(y)))
    for each in (fused, other):
        randomized(each)
        keras_bn.freeze(each)
    data = np.random.default_rng(0).normal(size=(2, 4, 3))
    expected = other.predict(data, verbose=0)
    keras_bn.freeze(fused, fuse=True)
    other.get_layer("other").set_fused(True)
    assert asked(other, data) == []
    np.testing.assert_allclose(other.predict(data, verbose=0), expected, 1e-5)


def test_an_activation_set_later_is_heeded():
    model = small()
    frozen, fused, _ = pair_of(model)
    for each in (frozen, fused):
        each.get_layer("dense").activation = keras.activations.relu
    assert asked(fused, ROWS) == []
    np.testing.assert_allclose(
        fused.predict(ROWS, verbose=0), frozen.predict(ROWS, verbose=0), 1e-5
    )


@pytest.mark.slow
def test_lora_and_quantization_that_come_later():
    for change in (
        lambda layer: layer.enable_lora(2),
        lambda layer: layer.quantize("int8"),
    ):
        model = small()
        frozen, fused, _ = pair_of(model)
        for each in (frozen, fused):
            layer = each.get_layer("dense")
            change(layer)
            if layer.lora_enabled:
                layer.lora_kernel_b.assign(np.ones((2, 5)))
                layer.lora_kernel_a.assign(np.ones((6, 2)))
        np.testing.assert_allclose(
            fused.predict(ROWS, verbose=0), frozen.predict(ROWS, verbose=0), 1e-4
        )
        assert keras_bn.freeze(fused, fuse=True)[0].into is None


def test_a_kernel_that_is_large_beside_the_output_is_left_alone(monkeypatch):
    monkeypatch.undo()  # of `every_size`
    for rows, names in ((8, ["conv"]), (2, [])):
        x = keras.Input((rows, rows, 8))
        conv = layers.Conv2D(8, 2, padding="same", name="conv")
        model = randomized(keras.Model(x, OURS()(conv(x))))
        data = inputs_of(model)
        frozen, fused, told = pair_of(model)
        assert told[0].into == "conv"
        assert asked(fused, data) == fused_into(*names)
        np.testing.assert_allclose(
            fused.predict(data, verbose=0), frozen.predict(data, verbose=0), 1e-4, 1e-4
        )


def test_what_is_refused_changes_nothing():
    model = keras.Sequential([layers.Dense(3), OURS(name="bn")])
    with pytest.raises(ValueError, match="not built"):
        keras_bn.freeze(model, fuse=True)
    assert not model.layers[1].freeze_statistics
    mixed = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(3, name="dense"),
            layers.BatchNormalization(name="theirs"),
            OURS(name="ours"),
        ]
    )
    with pytest.warns(UserWarning, match="'theirs' are layers of Keras"):
        (told,) = keras_bn.freeze(mixed, fuse=True)
    assert str(told) == "ours stays: 'theirs' before it is a batch normalization"


def test_a_call_set_on_a_layer_is_kept():
    model = small()
    layer = model.get_layer("dense")
    vars(layer)["call"] = lambda *a, **k: 2.0 * layers.Dense.call(layer, *a, **k)
    (told,) = keras_bn.freeze(model, fuse=True)
    assert told.reason == "'dense' before it has a `call` set on it"
    expected = array(model(ROWS))
    np.testing.assert_allclose(model.predict(ROWS, verbose=0), expected, 1e-5)


def check_same(model, told, names, tolerance=1e-10):
    """That it is fused as told, by layers of these names, and gives the same."""
    x = inputs_of(model)
    upstream = upstream_of(model, x)
    frozen, fused, plan = pair_of(model)
    assert str(plan).splitlines() == told
    assert asked(fused, x) == fused_into(*names)
    expected = gradients(frozen, x, upstream, COMPILED)
    found = gradients(fused, x, upstream, COMPILED)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    return fused


def conv(filters=3, size=1, name="conv", **options):
    return layers.Conv2D(filters, size, **{"padding": "same", **options}, name=name)


def behind(*makers):
    """A normalization behind a convolution and the layers that these make."""

    def build(x):
        x = conv()(x)
        for make in makers:
            x = make()(x)
        return OURS(name="bn")(x)

    return build


def first(x):
    return OURS(1, name="bn")(layers.Permute((3, 1, 2))(conv()(x)))


def apart(x):
    """Channels that stand in several places at once, and some scales twice."""
    x = layers.Conv2D(12, (6, 1), name="conv")(x)  # 1 × 6 × 12
    return OURS(name="bn")(layers.Reshape((6, 3, 4))(x))


def concatenated(x):
    pooled = layers.AveragePooling2D(3, 1, "same")(conv(2, 3, "wide")(x))
    return OURS(name="bn")(layers.Concatenate()([conv(3)(x), pooled]))


def rows(x):
    return OURS(name="bn")(layers.Concatenate(1)([conv(3)(x), conv(3, 3, "wide")(x)]))


def summed(x):
    other = layers.AveragePooling2D(3, 1, "same")(conv(3, 3, "wide")(x))
    return OURS(name="bn")(layers.Add()([conv(3)(x), other]))


def subtracted(x):
    other = conv(3, 3, "wide")(layers.ReLU()(x))
    return OURS(name="bn")(layers.Subtract()([conv(3)(x), other]))


BOTH = "conv, wide"
# Models from images of 6 × 6 × 2, and what their normalization goes into.
PASSED = {
    "nothing": (
        behind(layers.Identity, lambda: layers.Activation("linear")),
        "conv",
    ),
    "average pooling": (behind(lambda: layers.AveragePooling2D(2)), "conv"),
    "padded": (behind(lambda: layers.AveragePooling2D(3, 2, "same")), "conv"),
    "global average pooling": (behind(layers.GlobalAveragePooling2D), "conv"),
    "several": (
        behind(lambda: layers.Cropping2D(1), lambda: layers.UpSampling2D(2)),
        "conv",
    ),
    "Reshape": (behind(lambda: layers.Reshape((-1, 3))), "conv"),
    "Flatten": (
        behind(lambda: layers.GlobalAveragePooling2D(keepdims=True), layers.Flatten),
        "conv",
    ),
    "Permute": (first, "conv"),
    "Reshape, scales twice": (apart, "conv"),
    "Concatenate": (concatenated, BOTH),
    "Concatenate of rows": (rows, BOTH),
    "Add": (summed, BOTH),
    "Subtract": (subtracted, BOTH),
}


@pytest.mark.parametrize(
    "name", mostly_slow(PASSED, ["nothing", "average pooling", "Concatenate"])
)
def test_what_commutes_passes_a_normalization_on(name, float64):
    build, into = PASSED[name]
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 6, 2))
    model = randomized(keras.Model(x, layers.Flatten()(build(x))))
    # On JAX, Keras takes a mean of float64 in float32.
    mean = NAME == "jax" and name in ("global average pooling", "Flatten")
    tolerance = 1e-6 if mean else 1e-10
    fused = check_same(model, [f"bn -> {into}"], into.split(", "), tolerance)
    keras_bn.unfreeze(fused)
    assert not any("call" in vars(layer) for layer in fused.layers)


def test_dropout_drops_the_same_and_passes_on_what_it_does_not_change():
    dropped = behind(
        lambda: layers.AveragePooling2D(2), lambda: layers.Dropout(0.5, seed=1)
    )
    x = keras.Input((6, 6, 2))
    model = randomized(keras.Model(x, dropped(x)))
    frozen, fused, told = pair_of(model)
    assert told[0].into == "conv"
    data = inputs_of(model)
    assert asked(fused, data) == fused_into("conv")
    for each in (frozen, fused):
        each.compile("sgd", "mse")
        each.fit(data, np.ones((len(data), 3, 3, 3)), shuffle=False, verbose=0)
    for a, b in zip(frozen.weights, fused.weights, strict=True):
        np.testing.assert_allclose(array(a), array(b), 1e-5, 1e-6)


def penalized(x):
    return OURS(name="bn")(layers.ActivityRegularization(0.1)(conv()(x)))


def penalized_itself(x):
    return OURS(name="bn")(conv(activity_regularizer="l2")(x))


def an_operation(x):
    return OURS(name="bn")(conv()(x) + conv(3, 3, "wide")(x[:, ::-1]))


def pooled_twice(x):
    pool = layers.AveragePooling2D(2, name="pool")
    return layers.add([OURS(name="bn")(pool(conv()(x))), pool(conv(name="wide")(x))])


def read_by_two(x):
    y = layers.AveragePooling2D(2, name="pool")(conv()(x))
    return layers.Concatenate(name="join")([OURS(name="bn")(y), y])


def a_part_of_relu(x):
    parts = [conv()(x), layers.ReLU(name="relu")(conv(name="wide")(x))]
    return OURS(name="bn")(layers.Concatenate()(parts))


STAYING = {
    "a penalty": (penalized, "before it has a regularizer of its output"),
    "its own": (penalized_itself, "'conv' before it has a regularizer of its output"),
    "an operation": (an_operation, "before it is not a layer of the model"),
    "shared": (pooled_twice, "'pool' is shared: it is called in 2 places"),
    "two readers": (read_by_two, "'join' also uses the output of 'pool'"),
    "a part": (a_part_of_relu, "'relu' before it is not linear"),
}


@pytest.mark.parametrize("name", STAYING)
def test_why_a_normalization_stays(name):
    build, reason = STAYING[name]
    x = keras.Input((6, 6, 2))
    model = randomized(keras.Model(x, build(x)))
    (told,) = keras_bn.freeze(model, fuse=True)
    assert told.into is None
    assert reason in told.reason
    assert not any("call" in vars(layer) for layer in model.layers)


def branches(x, wide=None, narrow=None, add=layers.Add, shortcut=True):
    """Two convolutions and the tensor itself, all normalized, as in RepVGG."""
    wide, narrow = wide or conv(4, 3, "wide"), narrow or conv(4, use_bias=False)
    parts = [OURS(name="bn_wide")(wide(x)), OURS(name="bn_conv")(narrow(x))]
    if shortcut:
        parts.append(OURS(name="bn_itself", scale=False)(x))
    return add(name="sum")(parts)


SUM = ["bn_wide -> wide", "bn_conv -> conv", "bn_itself -> wide"]
WHOLE = "wide + conv + bn_itself -> wide"
SUMS = {
    "RepVGG": (branches, [*SUM, WHOLE]),
    "depthwise": (
        lambda x: branches(
            x,
            layers.DepthwiseConv2D(3, padding="same", name="wide"),
            layers.DepthwiseConv2D(1, name="conv"),
        ),
        [*SUM, WHOLE],
    ),
    "groups": (
        lambda x: branches(x, conv(4, 3, "wide", groups=2), conv(4, groups=2)),
        [*SUM, WHOLE],
    ),
    "strides": (
        lambda x: branches(
            x, conv(5, 3, "wide", strides=2), conv(5, strides=2), shortcut=False
        ),
        [*SUM[:2], "wide + conv -> wide"],
    ),
    "Dense": (
        lambda x: branches(x, narrow=layers.Dense(4, name="conv")),
        [*SUM, WHOLE],
    ),
    "difference": (
        lambda x: branches(x, add=layers.Subtract, shortcut=False),
        [*SUM[:2], "wide - conv -> wide"],
    ),
    "a sum of sums": (
        lambda x: layers.Add()([branches(x), x]),
        [*SUM, "wide + conv + bn_itself + identity -> wide"],
    ),
    "one behind": (
        lambda x: OURS(name="bn")(layers.AveragePooling2D(2)(branches(x))),
        [*SUM, "bn -> wide", WHOLE],
    ),
}


@pytest.mark.parametrize("name", mostly_slow(SUMS, ["RepVGG", "depthwise"]))
def test_parallel_branches_are_one_convolution(name, float64):
    build, told = SUMS[name]
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 6, 4))
    y = build(layers.ReLU()(x))
    model = randomized(keras.Model(x, layers.Flatten()(layers.ReLU()(y))))
    data = inputs_of(model)
    check_same(model, told, again(told))
    if NAME == "tensorflow" and name != "groups":  # which it compiles by itself
        fused = pair_of(model)[1]
        counts = reachable_ops(fused, data)
        assert counts["Conv2D"] + counts["DepthwiseConv2dNative"] == 1


def again(told):
    """The layers that compute again, given a plan: each branch, then the sums."""
    names = ["wide", "conv", "wide"]
    return names + ["wide"] * (("bn -> wide" in told) + ("identity" in told[-1]))


class Block(layers.Layer):
    """Branches in a layer, which adds them by a layer of its own or by another."""

    def __init__(self, add=None):
        super().__init__()
        self.wide, self.narrow = conv(4, 3, "wide"), conv(4)
        self.norms = [OURS(name=f"bn_{name}") for name in ("wide", "conv", "itself")]
        self.add = add

    def call(self, x):
        parts = [self.wide(x), self.narrow(x), x]
        parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        return (self.add or layers.Add())(parts)


@pytest.mark.parametrize("own", [True, False])
def test_branches_in_a_layer_of_a_class(own):
    x = keras.Input((6, 6, 4))
    y = Block(layers.Add(name="sum") if own else None)(layers.ReLU()(x))
    model = randomized(keras.Model(x, y))
    frozen, fused, told = pair_of(model)
    assert len(told.sums) == own
    data = inputs_of(model)
    assert asked(fused, data) == fused_into("wide", "conv", *["wide"] * own)
    outputs = [each.predict(data, verbose=0) for each in (fused, frozen)]
    np.testing.assert_allclose(*outputs, 1e-4, 1e-5)
    keras_bn.unfreeze(fused)
    assert asked(fused, data) == []


def repvgg():
    """A block between others, and its data."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((6, 6, 3))
    x = layers.ReLU(name="relu")(layers.Conv2D(4, 1)(x))
    x = layers.ReLU()(branches(x))
    parts = [layers.Conv2D(2, 1, name="left")(x), layers.Conv2D(3, 3, name="right")(x)]
    parts[0] = layers.Cropping2D(1)(parts[0])
    x = OURS(name="bn")(layers.Concatenate(name="join")(parts))
    x = layers.Dense(2)(layers.Flatten()(layers.Dropout(0.5, seed=0)(x)))
    rng = np.random.default_rng(2)
    data = rng.normal(size=(8, 6, 6, 3)), rng.normal(size=(8, 2))
    return randomized(keras.Model(image, x)), data


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"jit_compile": True},
            marks=[pytest.mark.slow, but_on("torch", "it needs a C++ compiler")],
        ),
        slow({"run_eagerly": True}),
    ],
)
def test_twenty_steps_of_a_model_with_branches(options, float64):
    model, data = repvgg()
    frozen, fused, _ = pair_of(model)
    expected = trained(frozen, data, **options)
    for a, b in zip(trained(fused, data, **options), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_branches_in_half_precision():
    with policy("mixed_float16"):
        model, (x, _) = repvgg()
    frozen, fused, told = pair_of(model)
    assert all(each.into for each in told)
    names = ["wide", "conv", "wide", "left", "right"]
    assert asked(fused, x) == fused_into(*names)
    outputs = [each.predict(x, verbose=0) for each in (fused, frozen)]
    np.testing.assert_allclose(*outputs, rtol=0.01, atol=0.02)


def test_layers_between_and_of_branches_give_their_own_output():
    model, (x, _) = repvgg()
    frozen, fused, _ = pair_of(model)
    names = ["wide", "conv", "bn_wide", "bn_itself", "sum", "left", "join"]
    outputs = []
    for each in (frozen, fused):
        inner = [each.get_layer(name).output for name in names]
        # Other tensors: of the same sizes, and of others, and linear ones among them.
        image = keras.Input((6, 6, 4))
        wide, norm, own = (each.get_layer(n) for n in ("wide", "bn_wide", "bn_itself"))
        read = [norm(wide(layers.ReLU()(image))), each.get_layer("conv")(image)]
        total = each.get_layer("sum")([*read, own(image)])
        other = each.get_layer("sum")([wide(image), own(image)])
        joined = each.get_layer("join")([wide(image), own(image)])
        flat = layers.Flatten()(image)
        vectors = each.get_layer("sum")([flat, flat, flat])
        read = [each.get_layer("conv")(image), norm(wide(image)), own(image)]
        turned = each.get_layer("sum")(read)
        parts = [
            each.get_layer("right")(image),
            each.get_layer("left")(image[:, 1:-1, 1:-1]),
        ]
        swapped = each.get_layer("bn")(each.get_layer("join")(parts))
        found = [total, other, own(joined[..., :4]), vectors, turned, swapped]
        others = keras.Model(image, found)
        images = np.random.default_rng(3).normal(size=(2, 6, 6, 4))
        features = keras.Model(each.input, inner)
        outputs.append(
            [*features.predict(x, verbose=0), *others.predict(images, verbose=0)]
        )
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)


@pytest.mark.parametrize("name", ["bn_wide", slow("bn_itself")])
def test_one_branch_is_no_longer_frozen(name, float64):
    model, data = repvgg()
    frozen, fused, _ = pair_of(model)
    found = []
    for each in (frozen, fused):
        each.predict(data[0], verbose=0)
        each.get_layer(name).freeze_statistics = False
        found.append(trained(each, data, steps=4))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    names = ["wide"] * (name != "bn_wide") + ["conv", "left", "right"]
    assert asked(fused, data[0]) == fused_into(*names)


def test_branches_with_kernels_that_are_large_are_left_alone(monkeypatch):
    model, (x, _) = repvgg()
    frozen, fused, _ = pair_of(model)
    monkeypatch.setattr(fuse, "MERGED", 100)
    assert asked(fused, x) == fused_into("wide", "conv", "left", "right")
    outputs = [each.predict(x, verbose=0) for each in (fused, frozen)]
    np.testing.assert_allclose(*outputs, 1e-4, 1e-5)


@pytest.mark.filterwarnings("ignore:.*no longer train")
def test_tools_take_out_what_passes_on():
    model, (x, _) = repvgg()
    keras_bn.freeze(model, fuse=True)
    expected = model.predict(x, verbose=0)
    copied = copy_model(model)[0]
    assert asked(copied, x) == asked(model, x)
    folded, theirs = keras_bn.fold(model), keras_bn.to_keras(model)
    for each in (copied, folded, theirs):
        np.testing.assert_allclose(each.predict(x, verbose=0), expected, 1e-4, 1e-5)
    for each in (folded, theirs, pickle.loads(pickle.dumps(model))):
        assert not any("call" in vars(layer) for layer in each.layers)
    keras_bn.unfreeze(model)
    assert not any("call" in vars(layer) for layer in model.layers)


@pytest.mark.skipif(NAME != "jax", reason="elsewhere tensors hold what is noted")
def test_nothing_is_kept_of_tensors_that_are_gone():
    same = behind(lambda: layers.Reshape((6, 6, 3)))  # JAX gives the tensor itself
    for build in (same, lambda x: branches(x, conv(2, 3, "wide"), conv(2))):
        x = keras.Input((6, 6, 2))
        model = randomized(keras.Model(x, build(x)))
        keras_bn.freeze(model, fuse=True)
        gc.collect()
        before = len(fusion._deferred)
        assert asked(model, inputs_of(model))
        gc.collect()
        assert len(fusion._deferred) == before
