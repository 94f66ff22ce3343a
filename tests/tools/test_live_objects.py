"""What a config cannot say, and what was traced before, through convert and fold."""

import collections
import gc

import keras
import numpy as np
import pytest
from keras import layers, ops
from support import backend
from support.backend import array, descend, tf
from support.marks import mostly_slow, mostly_slow_cases, slow
from support.zoo import GRAPHS, convolutional, inputs_of, randomized

import keras_bn
from keras_bn.surgery.graph import walk

KERAS = layers.BatchNormalization
OURS = keras_bn.BatchNormalization


def bent(x):
    return ops.sin(x) + x


class Bent:
    def __call__(self, x):
        return bent(x)


class Small(keras.regularizers.Regularizer):
    def __call__(self, weights):
        return 0.3 * ops.sum(weights**2)


class Positive(keras.constraints.Constraint):
    def __call__(self, w):
        return ops.maximum(w, 0.0)


class Ones(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return ops.ones(shape, dtype)


class Doubling(layers.Layer):
    """A layer whose constructor no config knows of."""

    def __init__(self, factor):
        super().__init__(name="doubling")
        self.multiply = lambda x: x * factor

    def call(self, x):
        return self.multiply(x)


LAYERS = {
    "activation, a function": lambda: layers.Dense(4, activation=bent),
    "activation, a lambda": lambda: layers.Dense(4, activation=lambda x: x * x),
    "activation, an object": lambda: layers.Activation(Bent()),
    "activation of TensorFlow": lambda: layers.Dense(4, activation=tf.nn.swish),
    "activation of keras.ops": lambda: layers.Activation(ops.sin),
    "initializer": lambda: layers.Dense(4, kernel_initializer=Ones()),
    "initializer, a function": lambda: layers.Dense(
        4, kernel_initializer=lambda shape, dtype=None: ops.ones(shape, dtype)
    ),
    "regularizer": lambda: layers.Dense(4, kernel_regularizer=Small()),
    "constraint": lambda: layers.Dense(4, kernel_constraint=Positive()),
    "wrapped lambda": lambda: layers.TimeDistributed(layers.Lambda(lambda x: 3.0 * x)),
    "constructor of its own": lambda: Doubling(2.0),
    "of the normalization": lambda: KERAS(
        gamma_initializer=Ones(), beta_regularizer=Small(), gamma_constraint=Positive()
    ),
}


@pytest.mark.parametrize("kind", mostly_slow(LAYERS, [*LAYERS][::3]))
def test_objects_of_the_users(kind):
    frames = kind == "wrapped lambda"
    x = keras.Input((3, 5) if frames else (5,))
    y = LAYERS[kind]()(layers.Dense(4)(x))
    y = KERAS(name="folded")(layers.Dense(4, use_bias=False, name="before")(y))
    y = KERAS(name="stays")(layers.Activation(bent)(y))
    model = randomized(keras.Model(x, y))
    data = inputs_of(model, 16)
    expected = array(model(data))
    losses = [float(v) for v in model.losses]
    for each in (
        keras_bn.from_keras(model),
        keras_bn.to_keras(keras_bn.from_keras(model)),
        keras_bn.fold(model),
        keras_bn.fold(keras_bn.from_keras(model)),
        keras_bn.from_keras(model, in_place=True),
    ):
        np.testing.assert_allclose(array(each(data)), expected, rtol=1e-4, atol=1e-5)
        if each.name == model.name and len(each.layers) == len(model.layers):
            found = [float(v) for v in each.losses]
            np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert np.std(expected) > 1e-2


class Net(keras.Sequential):
    def __init__(self, width, activation):
        super().__init__(
            [keras.Input((5,)), layers.Dense(width), KERAS(), layers.Dense(3)]
        )
        self.add(layers.Activation(activation))
        self.width = width


class Blend(keras.Model):
    """A functional subclass with an attribute that its call uses."""

    def __init__(self, units, alpha=0.3):
        x = keras.Input((5,))
        super().__init__(x, KERAS()(layers.Dense(units)(x)))
        self.alpha = alpha

    def call(self, x, training=None, mask=None):
        return self.alpha * super().call(x, training=training)


class Holding(keras.Model):
    """A subclassed model with closures, plain objects and a tf.function."""

    def __init__(self, units):
        super().__init__()
        self.dense, self.norm = layers.Dense(units), KERAS()
        self.then = lambda x: self.norm(self.dense(x))
        self.by_name = {"then": self.then, "dense": [self.dense]}
        self.traced = tf.function(self.step)

    def step(self, x):
        return self.then(x) + self.by_name["dense"][0](x)

    def call(self, x, training=None):
        return self.traced(x) if not training else self.step(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(4, bent),
        lambda: Blend(3, alpha=0.9),
        lambda: Blend(units=3),
        lambda: Holding(3),
    ],
)
def test_models_with_constructors_of_their_own(make):
    model = make()
    data = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    if isinstance(model, Holding):
        model.step(data)  # Keras would have it traced before it has variables
    model(data)
    randomized(model)
    model.compile("sgd", "mse")
    model.train_on_batch(data, np.ones((8, 3)))
    expected = array(model(data))
    ours = keras_bn.from_keras(model)
    assert type(ours) is type(model)
    np.testing.assert_allclose(array(ours(data)), expected, rtol=1e-5, atol=1e-5)
    ours.train_on_batch(data, np.zeros((8, 3)))
    np.testing.assert_array_equal(array(model(data)), expected)  # nothing is shared
    assert np.abs(array(ours(data)) - expected).max() > 1e-4
    if not isinstance(model, Holding):
        folded = keras_bn.fold(model)
        # A class that makes its own layers would make the normalizations again.
        assert isinstance(folded, keras.Sequential | keras.Model)
        assert not [la for _, la in walk(folded) if isinstance(la, KERAS)]
        np.testing.assert_allclose(array(folded(data)), expected, rtol=1e-4, atol=1e-5)
    assert keras_bn.from_keras(model, in_place=True) is model
    np.testing.assert_allclose(array(model(data)), expected, rtol=1e-5, atol=1e-5)
    model.train_on_batch(data, np.ones((8, 3)))


def test_lora_adapters_stay():
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(4, name="dense"), KERAS(), layers.Dense(2)]
    )
    model.get_layer("dense").enable_lora(2)
    model.compile("sgd", "mse")
    data = np.random.default_rng(0).normal(size=(16, 5)).astype("float32")
    model.fit(data, data[:, :2], verbose=0)
    ours = keras_bn.from_keras(model)
    dense = ours.get_layer("dense")
    assert dense.lora_enabled
    before = dense.lora_kernel_b.numpy(), dense._kernel.numpy()
    np.testing.assert_allclose(
        array(ours(data)), array(model(data)), rtol=1e-5, atol=1e-5
    )
    ours.fit(data, data[:, :2], verbose=0)
    assert np.abs(dense.lora_kernel_b.numpy() - before[0]).max() > 0
    np.testing.assert_array_equal(dense._kernel.numpy(), before[1])


class Counting(layers.Layer):
    """A layer with a variable that Keras does not know of."""

    def __init__(self):
        super().__init__()
        self.calls = [tf.Variable(0.0, trainable=False)]

    def call(self, x):
        self.calls[0].assign_add(1.0)
        return x


def test_plain_variables_are_copied():
    counting = Counting()
    model = keras.Sequential([keras.Input((4,)), counting, KERAS()])
    model(np.ones((2, 4), "float32"))
    before = float(counting.calls[0])
    ours = keras_bn.from_keras(model)
    copy = ours.layers[0]
    assert float(copy.calls[0]) == before
    ours(np.ones((2, 4), "float32"))
    assert (float(copy.calls[0]), float(counting.calls[0])) == (before + 1, before)


class Sharing(layers.Layer):
    """Functions that hold layers in their closures and defaults, and None beside."""

    def __init__(self):
        super().__init__()
        dense, nothing = layers.Dense(3), None
        self.dense = dense
        self.by_closure = lambda x: dense(x) if nothing is None else nothing
        self.by_default = lambda x, dense=dense: dense(x)
        self.by_keyword = lambda x, *, dense=dense: dense(x)

    def call(self, x):
        return self.by_closure(x) + self.by_default(x) + self.by_keyword(x)


def test_functions_that_hold_layers():
    model = keras.Sequential([keras.Input((4,)), Sharing(), KERAS()])
    x = np.ones((2, 4), "float32")
    expected = array(model(x))
    ours = keras_bn.from_keras(model)
    np.testing.assert_allclose(array(ours(x)), expected, rtol=1e-6)
    model.layers[0].dense.kernel.assign(model.layers[0].dense.kernel + 1.0)
    np.testing.assert_allclose(array(ours(x)), expected, rtol=1e-6)


class Ordered(layers.Layer):
    """Layers in an ordered dict, which are called in its order."""

    def __init__(self):
        super().__init__()
        steps = {"last": layers.Dense(3), "first": layers.Dense(5)}
        steps = collections.OrderedDict(steps)
        steps.move_to_end("last")
        self.steps = steps

    def call(self, x):
        for step in self.steps.values():
            x = step(x)
        return x


def test_an_ordered_dict_keeps_its_order():
    model = keras.Sequential([keras.Input((4,)), Ordered(), KERAS()])
    ours = keras_bn.from_keras(model)
    assert list(ours.layers[0].steps) == list(model.layers[0].steps) != []
    x = np.ones((2, 4), "float32")
    np.testing.assert_allclose(array(ours(x)), array(model(x)), rtol=1e-6)


def test_folding_takes_layers_out_of_an_ordered_dict():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), KERAS()])
    model.named = collections.OrderedDict({la.name: la for la in model.layers})
    folded = keras_bn.fold(model)
    assert list(folded.named.values()) == folded.layers
    assert len(folded.named) == 1
    assert len(model.named) == 2


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start * 0.5 ** ops.cast(step, "float32")


class Plain(keras.optimizers.Optimizer):
    def __init__(self, rate):
        super().__init__(learning_rate=rate)

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, gradient * ops.cast(learning_rate, variable.dtype))


class Largest(keras.metrics.Metric):
    def __init__(self, of):
        super().__init__(name=f"largest_{of}")
        self.total = self.add_variable((), "zeros", name="total")

    def update_state(self, y, p, sample_weight=None):
        self.total.assign(ops.maximum(self.total, ops.max(ops.abs(y - p))))

    def result(self):
        return self.total.value


def excluding():
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])
    return optimizer


OPTIMIZERS = {
    "schedule": lambda: keras.optimizers.SGD(Halving(0.1), momentum=0.9),
    "optimizer": lambda: Plain(0.1),
    "learning rate, a function": lambda: keras.optimizers.SGD(lambda: 0.05),
    "weight decay, exclusions by name": excluding,
    "accumulation": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2),
    "averages": lambda: keras.optimizers.SGD(0.1, use_ema=True),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)),
}


@pytest.mark.parametrize(
    ("kind", "in_place"),
    [
        *mostly_slow_cases(
            [(kind, False) for kind in OPTIMIZERS],
            [("schedule", False), ("averages", False), ("scaled", False)],
        ),
        *(slow(kind, True) for kind in ("schedule", "scaled")),
        pytest.param(
            "averages", True, marks=backend.but_on("jax", "Keras fits these once only")
        ),
    ],
)
def test_training_goes_on(kind, in_place):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8)), rng.normal(size=(64, 3))
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(6, use_bias=False),  # a bias there would be moved by noise
            KERAS(),
            layers.ReLU(),
            layers.Dense(3),
        ]
    )
    model.compile(
        OPTIMIZERS[kind](),
        lambda y, p: ops.mean((y - p) ** 2, -1),
        metrics=[Largest("error")],
    )
    how = {"batch_size": 16, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=2, **how)
    twin = keras_bn.to_keras(model)  # a copy that is exchanged in nothing
    ours = keras_bn.from_keras(model, in_place=in_place)
    a = twin.fit(x, y, epochs=3, **how).history
    b = ours.fit(x, y, epochs=3, **how).history
    assert a.keys() == b.keys() >= {"loss", "largest_error"}
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3)
    for mine, theirs in zip(twin.variables, ours.variables, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=2e-3)
    steps = 10 if kind == "accumulation" else 20
    assert int(ours.optimizer.iterations) == int(twin.optimizer.iterations) == steps


def test_weight_decay_exclusions_by_variable():
    layer = KERAS(gamma_initializer=keras.initializers.Constant(5.0))
    model = keras.Sequential([keras.Input((4,)), layer, layers.Dense(2)])
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[layer.gamma])
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(64, 4))
    ours = keras_bn.from_keras(model)
    for each in model, ours:
        each.fit(x, x[:, :2], epochs=10, verbose=0)
    gamma = model.layers[0].gamma.numpy()
    assert gamma.min() > 4.9  # with decay it would be 4.9 at most
    np.testing.assert_allclose(ours.layers[0].gamma, gamma, rtol=1e-3)


def changed_head(model):
    model.pop()
    model.add(layers.Dense(3, name="new_head"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        changed_head,
        lambda model: model.optimizer.build([*model.trainable_variables]),
        lambda model: setattr(model.layers[0], "trainable", False),
    ],
)
def test_models_that_changed_after_a_fit(change):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 8)), rng.normal(size=(32, 3))
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(6), KERAS(), layers.Dense(3)]
    )
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    change(model)
    ours = keras_bn.from_keras(model)
    np.testing.assert_allclose(array(ours(x)), array(model(x)), rtol=1e-5, atol=1e-5)
    ours.compile("adam", "mse")
    ours.fit(x, y, verbose=0)


def to_be_quantized():
    """Every layer that Keras quantizes, shared layers, a model in it, and data."""
    numbers, words = keras.Input((8,)), keras.Input((5,), dtype="int32")
    h = layers.Reshape((2, 4))(numbers)
    h = layers.EinsumDense("abc,cd->abd", (2, 4), bias_axes="d")(h)
    h = layers.Flatten()(KERAS()(h))
    shared, norm = layers.Dense(8), KERAS()
    h = norm(shared(norm(shared(h))))
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8), KERAS()])
    h = inner(inner(h))
    embedded = KERAS()(layers.Embedding(10, 4)(words))
    h = layers.Concatenate()([h, layers.Flatten()(embedded)])
    model = randomized(keras.Model([numbers, words], layers.Dense(3)(h)))
    return model, inputs_of(model, 16), np.zeros((16, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize(
    ("mode", "trained"),
    [
        ("int8", ""),
        pytest.param(
            *("int8", "before, after"),
            marks=backend.but_on("jax", "Keras asks to compile again after quantize"),
        ),
        ("int8", "after"),
        ("float8", ""),
    ],
)
def test_a_quantized_model_is_converted(mode, trained):
    """With the optimizer of a model that was compiled before or after."""
    model, x, y = to_be_quantized()
    if "before" in trained:
        model.compile("adam", "mse")
        model.fit(x, y, verbose=0)
    model.quantize(mode)
    if trained == "after":
        model.compile("adam", "mse")
    if trained:
        model.fit(x, y, verbose=0)
    expected = array(model(x))
    for ours in keras_bn.from_keras(model), keras_bn.from_keras(model, in_place=True):
        assert [la.quantization_mode for _, la in walk(ours)].count(mode) >= 4
        np.testing.assert_allclose(array(ours(x)), expected, rtol=1e-4, atol=1e-5)
        back = keras_bn.to_keras(ours)
        np.testing.assert_allclose(array(back(x)), expected, rtol=1e-4, atol=1e-5)
        if trained:
            before = ours.optimizer.iterations.numpy()
            ours.fit(x, y, verbose=0)
            assert ours.optimizer.iterations == before + 1


@pytest.mark.parametrize("make", GRAPHS)
def test_graphs_are_exchanged_in_place(make):
    model = randomized(make())
    x = inputs_of(model)
    before = keras.tree.flatten(model(x))
    others = {id(la) for _, la in walk(model) if type(la) is not KERAS}
    variables = {id(v) for v in model.variables}
    paths = [path for path, _ in walk(model)]
    assert keras_bn.from_keras(model, in_place=True) is model
    assert not [la for _, la in walk(model) if type(la) is KERAS]
    assert [path for path, _ in walk(model)] == paths
    assert {id(la) for _, la in walk(model) if type(la) is not OURS} == others
    assert {id(v) for v in model.variables} == variables
    for mine, theirs in zip(keras.tree.flatten(model(x)), before, strict=True):
        np.testing.assert_allclose(array(mine), array(theirs), rtol=1e-5, atol=1e-5)
    keras_bn.to_keras(model, in_place=True)
    for mine, theirs in zip(keras.tree.flatten(model(x)), before, strict=True):
        np.testing.assert_array_equal(array(mine), array(theirs))


def test_what_was_exchanged_saves_and_loads(tmp_path):
    model = randomized(convolutional())
    x = inputs_of(model)
    keras_bn.from_keras(model, in_place=True)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(loaded(x)), array(model(x)))
    loaded.load_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(array(clone(x)), array(model(x)))
    folded = keras_bn.fold(model)
    folded.save(tmp_path / "folded.keras")
    loaded = keras.saving.load_model(tmp_path / "folded.keras")
    np.testing.assert_array_equal(array(loaded(x)), array(folded(x)))


def test_what_was_exchanged_is_served(tmp_path):
    model = randomized(convolutional())
    x = inputs_of(model)
    keras_bn.from_keras(model, in_place=True)
    load = tf.saved_model.load
    model.export(tmp_path / "saved", verbose=False)
    served = load(str(tmp_path / "saved"))
    np.testing.assert_allclose(
        array(served.serve(x)), array(model(x)), rtol=1e-5, atol=1e-5
    )


class Adversarial(keras.Model):
    """Two optimizers, a compile and a training step of its own, no call."""

    def __init__(self, generator, critic):
        super().__init__()
        self.generator, self.critic = generator, critic
        self.built = True  # PyTorch's `fit` would call it to find out

    def compile(self, for_generator, for_critic):
        super().compile()
        self.for_generator, self.for_critic = for_generator, for_critic

    def train_step(self, data):
        noise = data[0] if isinstance(data, tuple) else data
        losses = {}
        for name, optimizer, model, sign in (
            ("critic", self.for_critic, self.critic, 1.0),
            ("generator", self.for_generator, self.generator, -1.0),
        ):

            def loss(sign=sign):
                made = self.generator(noise, training=True)
                return sign * ops.mean(self.critic(made, training=True))

            losses[name] = descend(loss, optimizer, model.trainable_variables)
        return losses


def adversarial():
    def stack(n):
        return keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(4, use_bias=False),
                KERAS(),
                layers.ReLU(),
                layers.Dense(n),
            ]
        )

    model = Adversarial(stack(4), stack(1))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.SGD(0.1))
    return model


@backend.but_on("jax", "a training step there is written without effects")
# On TensorFlow compiling takes ten seconds.
@pytest.mark.parametrize(
    "in_place",
    mostly_slow([False, True], [False] if backend.NAME == "torch" else []),
)
def test_a_gan_trains_on_after_conversion(in_place):
    model = adversarial()
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    model.fit(x, verbose=0)
    ours = keras_bn.from_keras(model, in_place=in_place)
    twin = keras_bn.to_keras(ours)
    before = [v.numpy() for v in ours.variables]
    for each in ours, twin:
        each.fit(x, epochs=2, batch_size=32, verbose=0)
    moved = [
        np.abs(v.numpy() - was).max()
        for v, was in zip(ours.variables, before, strict=True)
    ]
    assert min(moved) > 0
    for mine, theirs in zip(twin.variables, ours.variables, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_an_uncompiled_model_that_predicted_before():
    class Uncompiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = layers.Dense(4), KERAS()

        def call(self, x, training=None):
            return self.norm(self.dense(x), training=training)

    model = Uncompiled()
    x = np.random.default_rng(0).normal(3.0, 2.0, (128, 4)).astype("float32")
    model.predict(x, verbose=0)
    keras_bn.from_keras(model, in_place=True)
    keras_bn.recalibrate(model, x, verbose=0)
    np.testing.assert_allclose(model.predict(x, verbose=0), array(model(x)), 1e-5, 1e-5)
    assert np.abs(array(model(x))).max() < 10


def test_a_model_around_the_exchanged_one():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), KERAS(name="norm")], name="inner"
    )
    x = keras.Input((4,))
    outer = keras.Model(x, layers.Dense(2)(inner(x)))
    before_norm = keras.Model(inner.inputs, inner.layers[0].output)
    features = keras.Model(inner.inputs, inner.get_layer("norm").output)
    outer.compile("sgd", "mse")
    data = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    outer.fit(data, data[:, :2], verbose=0)
    expected = array(features(data))
    keras_bn.from_keras(inner, in_place=True)
    norm = inner.get_layer("norm")
    assert type(norm) is OURS
    assert features.get_layer("norm") is norm
    np.testing.assert_allclose(array(features(data)), expected, rtol=1e-5, atol=1e-5)
    mean = norm.moving_mean.numpy()
    outer.fit(data, data[:, :2], verbose=0)
    assert np.abs(norm.moving_mean.numpy() - mean).max() > 0
    assert len(before_norm.layers) == 2
    assert outer.train_function is not None


def test_without_the_compilation():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), KERAS()])
    model.compile(Plain(0.1), "mse", metrics=[Largest("error")])
    model.fit(np.ones((8, 4)), np.ones((8, 4)), verbose=0)
    ours = keras_bn.from_keras(model, compiled=False)
    assert not ours.compiled
    assert not hasattr(ours, "optimizer")
    ours.compile("sgd", "mse")
    ours.fit(np.ones((8, 4)), np.ones((8, 4)), verbose=0)
    assert model.compiled


def test_half_precision_variables_become_float32():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), KERAS(), layers.Dense(2)]
    )
    half = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, dtype="float16"),
            KERAS(dtype="float16"),
            layers.Dense(2, dtype="float16"),
        ]
    )
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    for each in model, half:
        each.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        each.fit(x, x[:, :2], verbose=0)
        for in_place in (False, True):
            ours = keras_bn.from_keras(each, in_place=in_place)
            norm = ours.layers[1]
            assert {v.dtype for v in norm.variables} == {"float32"}
            before = norm.gamma.numpy()
            history = ours.fit(x, x[:, :2], epochs=3, verbose=0).history["loss"]
            assert np.isfinite(history).all()
            assert np.abs(norm.gamma.numpy() - before).max() > 0


def test_nothing_of_the_original_is_kept_alive():
    model = convolutional()
    ours = keras_bn.from_keras(model)
    originals = {id(v) for v in model.variables}
    reached, waiting = set(), [ours]
    while waiting:
        each = waiting.pop()
        if id(each) in reached or not isinstance(each, dict | list | tuple | object):
            continue
        reached.add(id(each))
        if type(each).__module__.startswith("keras") and hasattr(each, "__dict__"):
            waiting += vars(each).values()
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, dict):
            waiting += each.values()
    assert len(reached) > 100
    assert not originals & reached
    gc.collect()


class Wrapping(layers.Layer):
    """Two modules of PyTorch: one that Keras wraps, and one in a list of the user's."""

    def __init__(self):
        import torch

        super().__init__()
        self.wrapped = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
        )
        self.plain = [torch.nn.Linear(4, 4)]

    def call(self, x, training=None):
        return self.plain[0](self.wrapped(x, training=training))


def wrapping():
    model = keras.Sequential(
        [keras.Input((4,)), Wrapping(), layers.Dense(3, name="before"), KERAS()]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def tensors(model):
    """Every tensor of a model that has modules of PyTorch in it, by name."""
    layer = model.layers[0]
    held = [v.value for v in model.variables]
    for module in (layer.wrapped.module, layer.plain[0]):
        held += module.state_dict(keep_vars=True).values()
    return held


TORCH = backend.only("torch", "modules of PyTorch are layers only there")


@TORCH
@pytest.mark.parametrize("tool", [keras_bn.from_keras, keras_bn.fold])
def test_modules_of_pytorch_are_copied(tool):
    model = wrapping()
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    model.fit(x, x[:, :3], verbose=0)
    expected, values = model.predict(x, verbose=0), [array(t) for t in tensors(model)]
    copy = tool(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    np.testing.assert_allclose(copy.predict(x, verbose=0), expected, 1e-5, 1e-6)
    storage = [{t.data_ptr() for t in tensors(each)} for each in (model, copy)]
    assert not set.intersection(*storage)
    # Keras trains what PyTorch computes with.
    wrapper = copy.layers[0].wrapped
    parameters = {id(p) for p in wrapper.module.parameters()}
    assert {id(v.value) for v in wrapper.variables} == parameters
    copy.compile(keras.optimizers.SGD(0.1), "mse")
    copy.fit(x, x[:, :3], verbose=0)
    assert np.abs(copy.predict(x, verbose=0) - expected).max() > 1e-3
    for tensor, value in zip(tensors(model), values, strict=True):
        np.testing.assert_array_equal(array(tensor), value)


@TORCH
def test_modules_that_share_a_parameter_do_so_in_the_copy():
    import torch

    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight = first.weight
    wrappers = [layers.TorchModuleWrapper(module) for module in (first, second)]
    copy = keras_bn.from_keras(keras.Sequential([keras.Input((4,)), *wrappers]))
    one, other = (layer.module.weight for layer in copy.layers)
    assert one is other
    assert one is not first.weight


@TORCH
def test_a_module_that_cannot_be_copied_is_named():
    import torch

    module = torch.nn.Linear(4, 4)
    module.twice = module.weight * 2
    model = keras.Sequential([keras.Input((4,)), layers.TorchModuleWrapper(module)])
    with pytest.raises(ValueError, match="The PyTorch module Linear cannot be copied"):
        keras_bn.from_keras(model)


@TORCH
@pytest.mark.parametrize("tool", [keras_bn.diagnose, keras_bn.recalibrate])
@pytest.mark.filterwarnings("ignore:The statistics of")
def test_a_pass_leaves_the_statistics_of_modules_alone(tool):
    model = keras_bn.from_keras(wrapping())
    x = np.random.default_rng(0).normal(3, 2, size=(16, 4)).astype("float32")
    before = [array(t) for t in model.layers[0].wrapped.module.buffers()]
    tool(model, x)
    after = [array(t) for t in model.layers[0].wrapped.module.buffers()]
    for was, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(was, now)
