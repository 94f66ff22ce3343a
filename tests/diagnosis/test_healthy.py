"""Healthy models get no error and no warning: applications, trained for a moment."""

import keras
import numpy as np
import pytest

import keras_bn

# All are made without weights.
SMALL = {"MobileNet": {"alpha": 0.25}, "MobileNetV2": {"alpha": 0.35}}
SLOW = (
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
    """An application, trained on random data with a momentum of 0.9; and the data."""
    keras.utils.set_random_seed(0)
    size = SIZES.get(name, 32)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=4, **options
    )
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * batch, size, size, 3)).astype("float32")
    y = rng.integers(0, 4, len(x))
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=batch, verbose=0)
    return model, (x[:256], y[:256])


@pytest.mark.parametrize(
    "name",
    ["MobileNet", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)],
)
def test_an_application(name):
    model, data = trained(name, **SMALL.get(name, {}))
    report = keras_bn.diagnose(model, data)
    assert report.healthy, str(report)
    assert keras_bn.diagnose(model).healthy
