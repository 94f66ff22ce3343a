"""Healthy models get no error and no warning: applications and networks of studies."""

import importlib
import sys
from functools import partial

import keras
import numpy as np
import pytest
from support.backend import only
from support.scripts import ROOT

import keras_bn

# All are made without weights.
SMALL = {"MobileNet": {"alpha": 0.25}, "MobileNetV2": {"alpha": 0.35}}
APPLICATIONS = (
    "MobileNet",
    "MobileNetV2",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "InceptionV3",
    "MobileNetV3Small",
    "ResNet50",
    "ResNet50V2",
    "Xception",
)
SIZES = {"InceptionV3": 75, "Xception": 71}


def trained(name, steps=100, batch=32, **options):
    """An application, trained on random images with a momentum of 0.9; and the data.

    The images are as the application takes them. The learning rate is so small that the
    weights do not run away from the statistics: gradients of the first step are large
    in networks as deep as these.
    """
    keras.utils.set_random_seed(0)
    size = SIZES.get(name, 32)
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(size, size, 3), classes=4, **options)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (steps * batch, size, size, 3)).astype("float32")
    x = sys.modules[make.__module__].preprocess_input(x)
    y = rng.integers(0, 4, len(x))
    model.compile(keras.optimizers.SGD(1e-4), "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=batch, verbose=0)
    return model, (x[:256], y[:256])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in APPLICATIONS],
)
def test_an_application(name):
    model, data = trained(name, **SMALL.get(name, {}))
    report = keras_bn.diagnose(model, data)
    assert report.healthy, str(report)
    assert keras_bn.diagnose(model).healthy


@pytest.fixture
def study(monkeypatch):
    """Imports a module of the studies."""
    pytest.importorskip("matplotlib", reason="the studies draw with matplotlib")
    pytest.importorskip("sklearn", reason="the studies take scikit-learn's digits")
    for folder in (ROOT / "examples", ROOT / "examples" / "studies"):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module


def convolution(study, digits):
    model = study("convolution").build()
    model.fit(digits.x_train, digits.y_train, 32, epochs=2, verbose=0)
    return model, digits.x_train, digits.y_train


def shifted_domain(study, digits):
    model = study("shifted_domain").train(digits, seed=0, epochs=2)
    return model, digits.x_train, digits.y_train


def inference_gap(study, digits, rule):
    module, convnet = study("inference_gap"), study("common.convnet")
    keras.utils.set_random_seed(0)
    model = convnet.prepare(module.make(rule), keras.optimizers.Adam(3e-3))
    model.fit(digits.x_train, digits.y_train, module.BATCH, epochs=2, verbose=0)
    return model, digits.x_train, digits.y_train


def small_batches(study, digits, method, size):
    module, convnet = study("small_batches"), study("common.convnet")
    keras.utils.set_random_seed(0)
    norm = getattr(module, method)(size, 2 * len(digits.x_train) // size)
    model = convnet.prepare(convnet.convnet(norm), keras.optimizers.Adam(3e-3))
    model.fit(digits.x_train, digits.y_train, 64, epochs=2, verbose=0)
    return model, digits.x_train, digits.y_train


def weight_averaging(study, digits):
    module = study("weight_averaging")
    model = module.start(0, use_ema=True, ema_momentum=module.EMA_MOMENTUM)
    callbacks = [
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras_bn.Recalibrate(digits.x_train, batch_size=module.BATCH),
    ]
    data = digits.x_train, digits.y_train
    model.fit(*data, module.BATCH, epochs=2, verbose=0, callbacks=callbacks)
    return model, *data


def int8(study, digits):
    module = study("int8")
    keras.utils.set_random_seed(0)
    model = module.network()
    module.fit(model, digits, 2, 3e-3)
    return model, digits.x_train, digits.y_train


def sequences(study, digits, network):
    module = study("sequences")
    learner = module.Learner(network, "mask")
    learner.restart(0)
    learner.train(digits, 45, seed=0)
    draw = np.random.default_rng(1)
    batch = module.sequences(digits.x_train, digits.y_train, draw, 512)
    return learner.model, *batch


def placement(study, digits):
    """Many networks side by side, at rates at which they learn."""
    module, parallel = study("placement"), study("common.parallel")
    runs = parallel.Runs(range(1), [1.0], [0.03, 0.1, 0.3])
    trainer = parallel.Trainer(runs, lambda: module.layers("relu", "before"))
    for epoch in range(2):
        trainer.epoch(digits, epoch)
    return trainer._model, digits.x_train.reshape(-1, parallel.UNITS), None


def first_figure(study, digits):
    module = study("first_figure")
    large = module.load("digits", None)
    network = module.Network("with BN", large)
    network.train(0, 4 * module.EVERY)
    return network._model, np.arange(len(large.x_train), dtype="int32"), large.y_train


STUDIES = {
    "convolution": convolution,
    "shifted_domain": shifted_domain,
    "inference_gap, low momentum": partial(inference_gap, rule="momentum 0.9"),
    "inference_gap, debiased": partial(inference_gap, rule="0.99, debias"),
    "small_batches, plain": partial(small_batches, method="plain", size=64),
    "small_batches, ghost": partial(small_batches, method="ghost", size=32),
    "small_batches, renorm": partial(small_batches, method="renorm", size=64),
    "weight_averaging": weight_averaging,
    "int8": int8,
    "sequences, recurrent": partial(sequences, network="recurrent"),
    "sequences, transformer": partial(sequences, network="transformer"),
    "placement": placement,
    "first_figure": first_figure,
}
IN_EVERY_RUN = ("inference_gap, debiased",)


@only("tensorflow", "the studies train on it")
@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow)
        for name in STUDIES
    ],
)
def test_a_network_of_a_study(study, name):
    """After the training of the short form, with data and without."""
    digits = study("common.data").small_digits()
    model, x, y = STUDIES[name](study, digits)
    # In an order as in training: the digits come as they were written.
    order = np.random.default_rng(0).permutation(len(keras.tree.flatten(x)[0]))[:512]
    x = keras.tree.map_structure(lambda array: array[order], x)
    report = keras_bn.diagnose(model, x if y is None else (x, y[order]))
    assert report.healthy, str(report)
    assert keras_bn.diagnose(model).healthy
