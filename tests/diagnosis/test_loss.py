"""The loss that the diagnosis compares is the one that `evaluate` gives."""

import functools
import inspect

import keras
import numpy as np
import pytest
from keras import layers
from support.backend import dataset
from support.marks import mostly_slow

import keras_bn

OURS = keras_bn.BatchNormalization
RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 1.5, (40, 4)).astype("float32")
CLASSES = RNG.integers(0, 3, 40)
ONE_HOT = np.eye(3, dtype="float32")[CLASSES]
BINARY = RNG.integers(0, 2, 40).astype("float32")

ALL = sorted(
    name
    for name, cls in vars(keras.losses).items()
    if inspect.isclass(cls) and issubclass(cls, keras.losses.Loss)
)


def of_classes(activation="softmax", norm=OURS):
    return keras.Sequential(
        [keras.Input((4,)), norm(), layers.Dense(3, activation=activation)]
    )


def binary(activation="sigmoid"):
    return keras.Sequential(
        [keras.Input((4,)), OURS(), layers.Dense(1, activation=activation)]
    )


@functools.cache
def shared(made):
    """One model for many losses: neither the diagnosis nor `evaluate` changes it."""
    return made()


def assert_as_evaluated(model, data, batch_size=32):
    """The loss in inference is that of `evaluate`; in training it is another."""
    model.run_eagerly = True  # two batches are no reason to trace
    found = keras_bn.diagnose(model, data, batch_size=batch_size).record.loss
    if isinstance(data, tuple):
        x, y, *weight = data
        weight = weight[0] if weight else None
        how = {"sample_weight": weight, "batch_size": batch_size}
        expected = model.evaluate(x, y, verbose=0, **how)
    else:
        expected = model.evaluate(data, verbose=0)
    expected = expected[0] if isinstance(expected, list) else expected
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert np.isfinite(found[1])
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "shape", mostly_slow(["(n,)", "(n, 1)", "(n, classes)"], ["(n, 1)"])
)
def test_every_loss_and_shape_of_labels(name, shape):
    cls = getattr(keras.losses, name)
    if name in ("Loss", "CTC", "Circle"):
        pytest.skip("wants data of its own; Circle and CTC are tested below")
    whole = shape == "(n, classes)"
    sparse = name.startswith("Sparse") or name == "CategoricalGeneralizedCrossEntropy"
    if sparse and whole:
        pytest.skip("takes class numbers")
    if name.startswith("Categorical") and not whole and not sparse:
        pytest.skip("takes one value per class")
    if whole or sparse:
        model, labels = shared(of_classes), ONE_HOT if whole else CLASSES
    else:
        model, labels = shared(binary), BINARY
    if shape == "(n, 1)":
        labels = labels[:, None]
    model.compile("sgd", cls())
    found = assert_as_evaluated(model, (X, labels))
    if found[0] > 1e-6:  # some losses are constant for one output
        assert found[0] != found[1]


def test_circle():
    model = of_classes(None)
    model.compile("sgd", keras.losses.Circle())
    assert_as_evaluated(model, (X, CLASSES))


def test_ctc():
    x = RNG.normal(1.0, 1.0, (20, 8, 4)).astype("float32")
    y = RNG.integers(1, 5, (20, 3))
    model = keras.Sequential([keras.Input((8, 4)), OURS(), layers.Dense(6)])
    model.compile("sgd", keras.losses.CTC())
    assert_as_evaluated(model, (x, y))


@pytest.mark.parametrize("loss", ["mse", "kl_divergence", "binary_crossentropy"])
def test_losses_by_name(loss):
    model = of_classes()
    model.compile("sgd", loss)
    assert_as_evaluated(model, (X, ONE_HOT))


def test_sample_weights():
    model = of_classes()
    model.compile("sgd", "sparse_categorical_crossentropy")
    weight = RNG.uniform(0.0, 3.0, 40).astype("float32")
    plain = assert_as_evaluated(model, (X, CLASSES))
    weighted = assert_as_evaluated(model, (X, CLASSES, weight))
    data = dataset((X, CLASSES, weight), 16)
    np.testing.assert_allclose(assert_as_evaluated(model, data), weighted, rtol=0.2)
    assert abs(plain[0] - weighted[0]) > 1e-3


def test_regularization_and_losses_of_the_layers():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            OURS(gamma_regularizer="l2"),
            layers.Dense(3, activity_regularizer="l1"),
        ]
    )
    model.compile("sgd", "mse")
    assert_as_evaluated(model, (X, ONE_HOT))


def several(names):
    x = keras.Input((4,), name="x")
    y = OURS()(x)
    outputs = {"a": layers.Dense(3, name="a")(y), "b": layers.Dense(1, name="b")(y)}
    return keras.Model(x, outputs if names else list(outputs.values()))


@pytest.mark.parametrize("names", [True, False])
def test_several_outputs(names):
    model = several(names)
    losses = {"a": "mse", "b": "mae"}
    weights = {"a": 2.0, "b": 0.5}
    labels = {"a": ONE_HOT, "b": BINARY}
    if not names:
        losses, weights, labels = (list(d.values()) for d in (losses, weights, labels))
    model.compile("sgd", losses, loss_weights=weights, metrics=None)
    assert_as_evaluated(
        model,
        dataset((X, labels if names else tuple(labels)), 32),
    )


def test_a_loss_of_the_users_and_one_of_the_model():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.dense = OURS(), layers.Dense(3)

        def call(self, x):
            return self.dense(self.norm(x))

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return keras.ops.mean(keras.ops.abs(y_pred - y)) + 7.0

    model = Own()
    model.compile("sgd", "mse")
    model(X)
    assert assert_as_evaluated(model, (X, ONE_HOT))[0] > 7
    model = of_classes()
    model.compile("sgd", lambda y, p: keras.ops.sum((y - p) ** 4, -1))
    assert_as_evaluated(model, (X, ONE_HOT))


def test_losses_that_depend_on_the_mode_or_on_no_loss_in_compile():
    class Louder(keras.Model):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            loss = keras.ops.mean(keras.ops.abs(y_pred - y))
            return 100.0 * loss if training else loss

    class Added(layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean(keras.ops.abs(x)))
            return x

    inputs = keras.Input((4,))
    for loss in "mse", None:
        model = Louder(inputs, layers.Dense(3)(OURS()(inputs)))
        model.compile("sgd", loss)
        assert_as_evaluated(model, (X, ONE_HOT))
    model = keras.Sequential([keras.Input((4,)), OURS(), Added(), layers.Dense(3)])
    model.compile("sgd")
    assert_as_evaluated(model, (X, ONE_HOT))


@pytest.mark.parametrize("compiled", [True, False])
def test_without_a_loss_there_is_none(compiled):
    model = of_classes()
    if compiled:
        model.compile("sgd")
    record = keras_bn.diagnose(model, (X, CLASSES)).record
    assert record.loss is None
    assert record.accuracy is not None


def test_what_fit_logs_is_not_disturbed():
    """Losses of several outputs are counted by metrics, which a pass must not move."""
    histories = []
    for logged in False, True:
        keras.utils.set_random_seed(0)
        model = several(True)
        model.compile("sgd", {"a": "mse", "b": "mae"}, metrics={"a": "mae"})
        y = {"a": ONE_HOT, "b": BINARY}
        data = dataset((X, y), 32)
        callbacks = [keras_bn.StatisticsLogger(data)] if logged else []
        histories.append(model.fit(data, epochs=2, callbacks=callbacks, verbose=0))
    first, second = (history.history for history in histories)
    assert first.keys() == second.keys()
    for key, values in first.items():
        np.testing.assert_allclose(values, second[key], rtol=1e-5)
