"""`keras_bn.functional`, and tools on subclassed models as people write them."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from support.marks import takes_fake_quantization
from support.zoo import randomized

import keras_bn

norm = keras_bn.BatchNormalization


class Residual(layers.Layer):
    """A residual block with a list of layers and a projection."""

    def __init__(self, filters, strides=1, **options):
        super().__init__(**options)
        self.steps = [
            layers.Conv2D(filters, 3, strides, "same", use_bias=False, name="conv_1"),
            norm(name="norm_1"),
            layers.ReLU(name="relu"),
            layers.Conv2D(filters, 3, padding="same", use_bias=False, name="conv_2"),
            norm(name="norm_2"),
        ]
        self.project = None
        if strides > 1:
            self.project = layers.Conv2D(filters, 1, strides, name="project")

    def call(self, inputs, training=False):
        x = inputs
        for layer in self.steps:
            x = layer(x)
        if self.project is not None:
            inputs = self.project(inputs)
        return ops.relu(x + inputs)


class ResNet(keras.Model):
    def __init__(self):
        super().__init__()
        self.stem = keras.Sequential([layers.Conv2D(4, 3, padding="same"), norm()])
        self.blocks = keras.Sequential([Residual(4), Residual(8, 2), Residual(8)])
        self.pool, self.drop = layers.GlobalAveragePooling2D(), layers.Dropout(0.5)
        self.head = layers.Dense(3)

    def call(self, inputs, training=False):
        x = self.blocks(self.stem(inputs), training=training)
        return self.head(self.drop(self.pool(x), training=training))


class UNet(keras.Model):
    def __init__(self):
        super().__init__()
        self.down = [layers.Conv2D(n, 3, padding="same") for n in (4, 6, 8)]
        self.down_norms = [norm() for _ in self.down]
        self.up = [layers.Conv2DTranspose(n, 2, 2) for n in (6, 4)]
        self.up_norms = {"0": norm(), "1": norm()}
        self.pool, self.head = layers.MaxPooling2D(), layers.Conv2D(2, 1)

    def call(self, x):
        skips = []
        for i, (conv, bn) in enumerate(zip(self.down, self.down_norms, strict=True)):
            x = ops.relu(bn(conv(x)))
            if i < 2:
                skips.append(x)
                x = self.pool(x)
        for i, conv in enumerate(self.up):
            x = ops.concatenate([self.up_norms[str(i)](conv(x)), skips.pop()], axis=-1)
        return self.head(x)


class SqueezeExcite(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = layers.Conv2D(8, 3, padding="same"), norm()
        self.squeeze = layers.GlobalAveragePooling2D(keepdims=True)
        self.reduce = layers.Dense(2, activation="relu")
        self.expand = layers.Dense(8, activation="sigmoid")

    def call(self, x):
        x = ops.silu(self.bn(self.conv(x)))
        return x * self.expand(self.reduce(self.squeeze(x)))


class Pyramid(keras.Model):
    """Several outputs, in a dict."""

    def __init__(self):
        super().__init__()
        self.convs = [layers.Conv2D(6, 3, 2, "same") for _ in range(2)]
        self.norms = [norm() for _ in range(2)]
        self.lateral = [layers.Conv2D(4, 1) for _ in range(2)]
        self.up = layers.UpSampling2D()

    def call(self, x):
        levels = []
        for conv, bn in zip(self.convs, self.norms, strict=True):
            x = ops.relu(bn(conv(x)))
            levels.append(x)
        top = self.lateral[1](levels[1])
        return {"p4": top, "p3": self.lateral[0](levels[0]) + self.up(top)}


class Loop(keras.Model):
    """One block, called again and again."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = layers.Conv2D(4, 1), norm()
        self.block = Residual(4)

    def call(self, x):
        x = self.bn(self.stem(x))
        for _ in range(3):
            x = self.block(x)
        return x


class Siamese(keras.Model):
    """Two inputs, one stem."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = layers.Conv2D(4, 3), norm()
        self.mix, self.mixed = layers.Dense(5), norm()

    def call(self, inputs):
        left, right = (ops.relu(self.bn(self.stem(x))) for x in inputs)
        return self.mixed(self.mix(ops.abs(left - right)))


class Attention(layers.Layer):
    def __init__(self, units):
        super().__init__()
        self.query, self.key = layers.Dense(units), layers.Dense(units)
        self.value, self.bn = layers.Dense(units), norm()

    def call(self, x):
        scores = ops.matmul(self.query(x), ops.transpose(self.key(x), (0, 2, 1)))
        return self.bn(self.value(ops.matmul(ops.softmax(scores), x)))


class Attending(keras.Model):
    def __init__(self):
        super().__init__()
        self.flat = layers.Reshape((64, 3))
        self.embed, self.block = layers.Dense(6), Attention(6)

    def call(self, x):
        x = self.embed(self.flat(x))
        return x + self.block(x)


class Stacked(keras.Model):
    """A graph of blocks in a model, with a dropout between them."""

    def __init__(self):
        super().__init__()
        self.flat, self.embed = layers.Reshape((64, 3)), layers.Dense(6)
        self.block = keras.Sequential(
            [Attention(6), layers.Dropout(0.5, seed=1), Gate()]
        )

    def call(self, x, training=False):
        return self.block(self.embed(self.flat(x)), training=training)


class Gate(layers.Layer):
    def __init__(self):
        super().__init__()
        self.gate, self.bn = layers.Dense(6), norm()

    def call(self, x, training=False):
        return x * self.bn(self.gate(x), training=training)


class Heads(layers.Layer):
    """Attention of several heads, with the batch size that it is called with."""

    def __init__(self, units):
        super().__init__()
        self.dense, self.bn = layers.Dense(3 * units), norm()

    def call(self, x):
        batch, length, units = ops.shape(x)
        x = ops.reshape(self.bn(self.dense(x)), (batch, length, 3, 2, units // 2))
        query, key, value = ops.unstack(ops.transpose(x, (2, 0, 3, 1, 4)), axis=0)
        scores = ops.softmax(ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))))
        x = ops.transpose(ops.matmul(scores, value), (0, 2, 1, 3))
        return ops.reshape(x, (batch, length, units))


class MultiHead(keras.Model):
    def __init__(self):
        super().__init__()
        self.flat = layers.Reshape((64, 3))
        self.embed, self.heads = layers.Dense(6), Heads(6)

    def call(self, x):
        return self.heads(self.embed(self.flat(x)))


class Around(keras.Model):
    """A model around a backbone of `keras.applications`."""

    def __init__(self):
        super().__init__()
        self.backbone = keras.applications.MobileNet(
            (32, 32, 3), alpha=0.25, include_top=False, weights=None
        )
        self.up = layers.Resizing(32, 32)
        self.dense, self.bn = layers.Dense(4), norm()

    def call(self, x, training=None):
        return self.bn(self.dense(self.backbone(self.up(x), training=training)))


IMAGE = (8, 8, 3)
# The class, and how many of its normalizations fold.
MODELS = {
    ResNet: (7, 7),
    UNet: (5, 5),
    SqueezeExcite: (1, 1),
    Pyramid: (2, 2),
    Loop: (1, 3),
    Siamese: (1, 2),
    Attending: (1, 1),
    Stacked: (2, 2),
    MultiHead: (1, 1),
    Around: (28, 28),
}


def built(kind):
    x = np.random.default_rng(0).normal(size=(4, *IMAGE)).astype("float32")
    x = [x, x[::-1].copy()] if kind is Siamese else x
    model = kind()
    model(x)
    randomized(model)
    return model, x


def arrays(outputs):
    return [ops.convert_to_numpy(ops.cast(y, "float32")) for y in flat(outputs)]


def flat(outputs):
    return keras.tree.flatten(outputs)


def same(one, two):
    for a, b in zip(arrays(one), arrays(two), strict=True):
        np.testing.assert_array_equal(a, b)


def calls(model):
    return [
        (layer.name, len(layer._inbound_nodes), len(layer._outbound_nodes))
        for layer in model._flatten_layers()
    ]


UNIQUE = [kind for kind in MODELS if kind is not ResNet]


@pytest.mark.parametrize("kind", UNIQUE)
def test_outputs_are_the_same_bits(kind):
    model, x = built(kind)
    graph = keras_bn.functional(model)
    assert {id(v) for v in graph.variables} == {id(v) for v in model.variables}
    same(graph(x), model(x))
    small = keras.tree.map_structure(lambda a: a[:1], x)
    same(graph(small), model(small))


@pytest.mark.parametrize("kind", MODELS)
def test_what_folds(kind):
    model, x = built(kind)
    before, names = arrays(model(x)), calls(model)
    folds = keras_bn.plan_fold(model)
    assert (sum(f.into is not None for f in folds), len(folds)) == MODELS[kind]
    folded = keras_bn.fold(model)
    for a, b in zip(before, arrays(folded(x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    same(model(x), before)
    assert calls(model) == names


@pytest.mark.parametrize("kind", [SqueezeExcite, Stacked, Around])
def test_training_does_the_same(kind):
    (model, x), (other, _) = built(kind), built(kind)
    other.set_weights(model.get_weights())
    graph = keras_bn.functional(other)
    for _ in range(2):
        model(x, training=True), graph(x, training=True)
    for a, b in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(*(ops.convert_to_numpy(v) for v in (a, b)))


@pytest.mark.parametrize("kind", [UNet, Loop])
def test_mixed_precision(kind):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, x = built(kind)
    finally:
        keras.config.set_dtype_policy(policy)
    same(keras_bn.functional(model)(x), model(x))


class Built(keras.Model):
    """Calls its layers by a function."""

    def __init__(self, function, *parts, **options):
        super().__init__(name="net", **options)
        self.function, self.parts = function, list(parts)

    def call(self, x, training=None):
        return self.function(x, training, *self.parts)


def net(function, *parts, shape=(2, 6)):
    model = Built(function, *parts)
    model(np.ones(shape, "float32"))
    return model


class OwnWeight(layers.Layer):
    """Computes with a variable of its own between its layers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dense, self.bn = layers.Dense(6), norm()

    def build(self, shape):
        self.dense.build(shape)
        self.bn.build(shape)
        self.scale = self.add_weight(shape=(6,), name="scale")

    def call(self, x):
        return self.bn(self.dense(x) * self.scale)


class Loss(OwnWeight):
    """Adds a loss."""

    def build(self, shape):
        self.dense.build(shape)
        self.bn.build(shape)

    def call(self, x):
        self.add_loss(ops.mean(x))
        return self.bn(self.dense(x))


class Training(Loss):
    """Other layers in training than in inference."""

    def call(self, x, training=False):
        return self.bn(x) if training else self.bn(self.dense(x))


class Noisy(Loss):
    """Other numbers in each call."""

    def call(self, x):
        return self.bn(self.dense(x)) * float(np.random.default_rng().normal())


class Tied(Loss):
    """Computes with the weights of a layer that it holds."""

    def call(self, x):
        return ops.matmul(self.bn(self.dense(x)), ops.transpose(self.dense.kernel))


class Reshaped(Loss):
    """Takes the size of the batch, which a graph does not know, for a number."""

    def call(self, x):
        y = self.bn(self.dense(x))
        size = ops.shape(y)[0]
        return ops.reshape(ops.reshape(y, (size, 2, 3)), [size, -1])


class Spread(Reshaped):
    """The same in another operation."""

    def call(self, x):
        y = self.bn(self.dense(x))
        return y + ops.broadcast_to(ops.mean(y, 0, keepdims=True), ops.shape(y))


@pytest.mark.parametrize(
    "kind",
    [OwnWeight, Loss, Training, Noisy, Tied, Reshaped, Spread],
    ids=lambda k: k.__name__,
)
def test_what_cannot_be_opened_stays_one_layer(kind):
    """In a model that is opened around it."""
    block, bn = kind(name="block"), norm(name="bn")
    model = net(lambda x, _, *la: la[2](la[0](la[1](x))), layers.Dense(6), block, bn)
    graph = keras_bn.functional(model, keras.Input((6,)))
    assert block in graph.layers
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    if kind is not Noisy:
        same(graph(x), model(x))
        same(graph(x, training=True), model(x, training=True))
    assert [float(v) for v in graph.losses] == [float(v) for v in model.losses]
    assert not any("symbolic_call" in vars(la) for la in model._flatten_layers())
    plan = {fold.layer: str(fold) for fold in keras_bn.plan_fold(model)}
    assert plan["bn"] == f"bn -> {model.parts[0].name}"
    (inner,) = set(plan) - {"bn"}
    assert "'block' around it cannot be opened: " in plan[inner]


DROPOUT = layers.Dropout(0.5)

REFUSED = {
    "values": (lambda x, t, a: a(x) if ops.max(x) > 0 else x, "functional.py:[0-9]+: "),
    "numpy": (lambda x, t, a: a(np.tanh(x)), "test_functional.py:[0-9]+: "),
    "training": (lambda x, t, a: a(x) if t else x, "depends on `training`"),
    "constant": (lambda x, t, a: DROPOUT(x, training=False), "`training` of its"),
    "variable": (lambda x, t, a: a(x) * a.kernel[0, 0], "outside of its layer"),
    "constant of a layer": (lambda x, t, a: a(ops.ones((1, 6))) + x, "outside"),
    "sizes": (lambda x, t, a: ops.reshape(a(x), (ops.shape(x)[0], -1)), "not known"),
    "no tensor": (lambda x, t, a: (a(x), 3), "tensors alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_no_graph_computes_is_refused_in_a_sentence(name):
    function, message = REFUSED[name]
    try:
        model = net(function, layers.Dense(6))
    except Exception:
        pytest.skip("the backend computes no such model")
    before = calls(model)
    with pytest.raises(ValueError, match=message):
        keras_bn.functional(model, keras.Input((6,)))
    assert calls(model) == before


def test_a_layer_without_a_config(tmp_path):
    """Newer Keras makes none of an `Identity` with a policy of its own."""
    identity = layers.Identity(dtype=keras.DTypePolicy("float32"))
    model = net(
        lambda x, _, *la: la[2](la[1](la[0](x))), layers.Dense(6), identity, norm()
    )
    (fold,) = keras_bn.plan_fold(model)
    assert fold.into == model.parts[0].name, fold.reason
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    keras_bn.fold(model).save(tmp_path / "folded.keras")
    opened = keras.saving.load_model(tmp_path / "folded.keras")
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (opened(x), model(x))), 1e-4)


def test_equal_names_are_refused_and_tools_fold_all_the_same():
    model, _ = built(ResNet)
    with pytest.raises(ValueError, match="of its layers have the name 'conv_1'"):
        keras_bn.functional(model)
    assert len(keras_bn.plan_fold(model)) == 7


def test_masks():
    parts = [layers.Embedding(9, 4, mask_zero=True), layers.LSTM(3), norm()]
    tokens = np.array([[1, 2, 0], [3, 0, 0]], "int32")
    model = Built(lambda x, _, a, b, c: c(b(a(x))), *parts)
    model(tokens)
    same(
        keras_bn.functional(model, keras.Input((3,), dtype="int32"))(tokens),
        model(tokens),
    )
    same(keras_bn.functional(model)(tokens), model(tokens))


class Several(keras.Model):
    """Two arguments."""

    def __init__(self):
        super().__init__()
        self.dense, self.bn = layers.Dense(3), norm()

    def call(self, left, right):
        return self.bn(self.dense(left)), left + right


def test_several_arguments_are_refused():
    model = Several()
    x = np.ones((2, 3), "float32")
    model(x, 2 * x)
    with pytest.raises(ValueError, match="'right'"):
        keras_bn.functional(model)
    assert [fold.into for fold in keras_bn.plan_fold(model)] == [None]


def test_blocks_in_a_functional_model_are_opened():
    x = keras.Input((8, 8, 4))
    y = Residual(4, name="a")(layers.ReLU()(Residual(4, name="b")(x)))
    model = randomized(keras.Model({"x": x}, {"y": y}))
    images = {"x": np.random.default_rng(0).normal(size=(2, 8, 8, 4))}
    assert all(fold.into for fold in keras_bn.plan_fold(model))
    folded = keras_bn.fold(model)
    np.testing.assert_allclose(
        *(ops.convert_to_numpy(m(images)["y"]) for m in (folded, model)), 1e-4, 1e-5
    )


def test_a_graph_is_its_own_functional_model():
    model = keras.Sequential([keras.Input((3,)), norm()])
    assert keras_bn.functional(model) is model
    layer = norm()
    layer.build((None, 3))
    with pytest.raises(TypeError, match="`model` must be a Keras model"):
        keras_bn.functional(layer)


def test_frozen_layers_are_fused_in_a_subclassed_model():
    model, x = built(ResNet)
    before = arrays(model(x))
    assert all(fold.into for fold in keras_bn.freeze(model, fuse=True))
    for a, b in zip(before, arrays(model.predict(x, verbose=0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@takes_fake_quantization
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs TFLite")
def test_int8(tmp_path):
    model, x = built(ResNet)
    names = calls(model)
    report = keras_bn.export_int8(model, tmp_path / "model.tflite", x)
    assert report.error < 0.1
    aware = keras_bn.quantize_aware(model, x)
    assert keras_bn.export_int8(aware, tmp_path / "aware.tflite").error < 0.1
    assert calls(model) == names
