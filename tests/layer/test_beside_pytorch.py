"""On Keras's PyTorch backend, the example's models train as with `nn.BatchNorm1d`."""

import sys

import keras
import numpy as np
import pytest
from conftest import require
from support import backend
from support.scripts import ROOT

import keras_bn

pytestmark = backend.only("torch", "both sides are PyTorch there")
MODELS = ("784-64-BN-ReLU-10-softmax", "784-256-BN-ReLU-128-BN-ReLU-10")
BATCHES, BATCH = 25, 32


@pytest.fixture
def example(monkeypatch):
    """The module `examples/torch_equivalence.py`."""
    require("sklearn")
    require("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import torch_equivalence

    return torch_equivalence


@pytest.mark.parametrize("title", MODELS)
def test_the_losses_are_the_same(title, example):
    digits = sys.modules["digits"].enlarged_digits()
    assert set(example.MODELS) == set(MODELS)
    widths, softmax = example.MODELS[title]
    keras.utils.set_random_seed(0)
    model = example.keras_model(widths, softmax, keras_bn.BatchNormalization)
    weights = model.get_weights()
    theirs = example.TorchSide(example.torch_model(widths, softmax), weights)
    ours = example.KerasSide("ours", model)
    losses = []
    for number in range(BATCHES):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        x, y = digits.x_train[rows].astype("float32"), digits.y_train[rows]
        losses.append(
            [side.train(x, y, BATCH, lambda: None)[0] for side in (ours, theirs)]
        )
    mine, others = np.transpose(losses)
    assert others[-1] < 0.5 * others[0]
    np.testing.assert_allclose(mine, others, rtol=1e-4)
    for a, b in zip(ours.moving_statistics().values(), moving(theirs), strict=True):
        assert np.abs(a - b).max() < 1e-3 * np.abs(b).max()
    x = digits.x_val.astype("float32")
    np.testing.assert_allclose(ours.outputs(x), theirs.outputs(x), rtol=1e-2, atol=1e-3)


def moving(side):
    return side.moving_statistics().values()
