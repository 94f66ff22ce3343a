"""On scikit-learn's digits: what recalibration mends and spoils, freezing keeps."""

import functools

import keras
import numpy as np
import pytest
from keras import layers
from sklearn.datasets import load_digits
from support.backend import NAME

import keras_bn

# What adapting to noise gains at least, in accuracy; other backends draw other weights.
NOISE = 0.05 if NAME == "tensorflow" else 0.02
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
recalibrate = functools.partial(keras_bn.recalibrate, batch_size=500, verbose=0)


@functools.cache
def digits(seed):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8, 1).astype("float32")
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = np.split(order, [1300])
    return x[train], y[train], x[test], y[test]


@functools.cache
def trained(seed):
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((8, 8, 1))]
    for filters, strides in ((16, 1), (32, 2)):
        stack += [
            layers.Conv2D(filters, 3, strides, padding="same", use_bias=False),
            keras_bn.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        ]
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    model = keras.Sequential(stack)
    fit(model, 3e-3, 15, *digits(seed)[:2])
    return model


def fit(model, rate, epochs, x, y):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(x, y, epochs=epochs, batch_size=32, verbose=0)


def copy(model):
    new = keras.models.clone_model(model)
    new.set_weights(model.get_weights())
    return new


def accuracy(model, x, y):
    return (model.predict(x, verbose=0, batch_size=500).argmax(-1) == y).mean()


class Stream(keras.utils.PyDataset):
    """One batch, with its labels."""

    def __init__(self, x, y):
        super().__init__()
        self.batch = x, y

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return self.batch


@pytest.mark.parametrize("seed", SEEDS)
def test_averaged_weights_are_mended(seed):
    x, y, x_test, y_test = digits(seed)
    rng, runs = np.random.default_rng(seed), []
    for _ in range(3):
        model = copy(trained(seed))
        order = rng.permutation(len(x))
        fit(model, 1e-2, 4, x[order], y[order])
        runs.append([v.numpy() for v in model.trainable_variables])
    for variable, values in zip(
        model.trainable_variables, zip(*runs, strict=True), strict=True
    ):
        variable.assign(np.mean(values, 0))
    broken = accuracy(model, x_test, y_test)
    recalibrate(model, x)
    mended = accuracy(model, x_test, y_test)
    assert mended > 0.95
    # Other backends draw other batches, and what is broken differs.
    assert 1 - mended < (0.8 if NAME == "tensorflow" else 1.0) * (1 - broken)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("shift", "least", "margin"),
    [
        (lambda x, rng: 0.5 + 0.6 * (x - 0.5), 0.9, 0.05),
        (lambda x, rng: x + 0.5, 0.9, 0.05),
        (lambda x, rng: x + rng.normal(0.0, 0.3, x.shape), 0.4, NOISE),
    ],
    ids=["contrast", "brightness", "noise"],
)
def test_a_shifted_domain_is_adapted_to(shift, least, margin, seed):
    _, _, x, y = digits(seed)
    x = shift(x, np.random.default_rng(seed)).astype("float32")
    before = accuracy(trained(seed), x, y)
    model = copy(trained(seed))
    recalibrate(model, x)
    after = accuracy(model, x, y)
    assert after > max(least, before + margin)
    # From 32 images, holding on to a little of what was known.
    model = copy(trained(seed))
    recalibrate(model, x[:32], prior=1)
    assert accuracy(model, x, y) > max(least, before + margin) - 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_a_skewed_stream_hurts_and_warns_and_a_prior_helps(seed):
    _, _, x, y = digits(seed)
    before = accuracy(trained(seed), x, y)
    stream = Stream(x[y == 1][:40], y[y == 1][:40])
    model = copy(trained(seed))
    with pytest.warns(UserWarning, match=r"1\.0 classes in effect.*10 apart"):
        recalibrate(model, stream, batch_size=None)
    hurt = accuracy(model, x, y)
    assert hurt < before - 0.03
    model = copy(trained(seed))
    with pytest.warns(UserWarning, match="classes in effect"):
        recalibrate(model, stream, batch_size=None, prior=400)
    assert accuracy(model, x, y) > before - 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_fine_tuning_leaves_frozen_statistics_alone_to_the_bit(seed):
    x, y, *_ = digits(seed)
    negative, labels = 1 - x[:40], y[:40]
    base = copy(trained(seed))
    keras_bn.freeze(base)
    base.pop()
    model = keras.Sequential([base, layers.Dense(10)])
    before = variables(base)
    base.trainable = False
    fit(model, 3e-3, 1, negative, labels)
    assert changed(before, variables(base)) == set()
    base.trainable = True
    fit(model, 3e-3, 1, negative, labels)
    moving = {path for path in before if "moving" in path}
    assert len(moving) == 4
    assert changed(before, variables(base)) == before.keys() - moving
    keras_bn.unfreeze(base)
    fit(model, 3e-3, 1, negative, labels)
    assert changed(before, variables(base)) == before.keys()


def variables(model):
    return {v.path: v.numpy() for v in model.variables if "seed" not in v.path}


def changed(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}
