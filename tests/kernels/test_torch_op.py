"""PyTorch's op: when it is computed on a shifted input, and what it keeps."""

import numpy as np
import pytest
from support import backend
from support.backend import tensor

import keras_bn

if backend.NAME != "torch":
    pytest.skip("torch only: its op", allow_module_level=True)

import torch

from keras_bn.kernels.torch import batch, rows


def layer_on(x):
    layer = keras_bn.BatchNormalization()
    layer.build(x.shape)
    return layer


@pytest.mark.parametrize(
    ("mean", "times"), [(0.0, 0), (5.0, 0), (20.0, 1), (1e4, 1), (np.nan, 0)]
)
def test_a_shift_where_a_mean_is_large(mean, times, monkeypatch):
    seen = []
    shifted = batch._shifted
    monkeypatch.setattr(
        batch, "_shifted", lambda *given: seen.append(given) or shifted(*given)
    )
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    x[:, 1] += mean
    layer_on(x)(x, training=True)
    assert len(seen) == times


@pytest.mark.parametrize("shape", [(64, 8), (4, 6, 6, 8), (5, 7, 8), (70000, 2)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_one_activation_is_kept(shape, mean):
    """Without a shift it is the input itself, which is there anyway."""
    rng = np.random.default_rng(0)
    x = tensor(rng.normal(mean, 1, shape), "float32").requires_grad_()
    layer = layer_on(x)
    alive = []

    class Kept:
        """What the backward pass holds on to, for as long as it does."""

        def __init__(self, value):
            self.value = value
            alive.append(value)

        def __del__(self):
            alive[:] = [each for each in alive if each is not self.value]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
        y = layer(x, training=True)
    large = [each for each in alive if each.numel() == x.numel()]
    assert len(large) == 1
    assert (large[0].data_ptr() == x.data_ptr()) == (mean == 0)
    y.sum().backward()


def in_float64(x, gamma, beta):
    """The same by PyTorch's own differentiation, in double precision."""
    d = x - x.mean(0)
    variance = (d * d).mean(0)
    return d / torch.sqrt(variance + 1e-3) * gamma + beta, variance


# The last two are no whole number of blocks, and of rows side by side.
@pytest.mark.parametrize("shape", [(70000, 8), (20, 60, 60, 5), (100003, 3)])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_long_sums_lose_no_digits(shape, mean):
    rng = np.random.default_rng(0)
    x, upstream = (tensor(rng.normal(size=shape) + m) for m in (mean, 0))
    layer = keras_bn.BatchNormalization(momentum=0.0)
    layer.build(shape)
    parameters = [layer.gamma.value, layer.beta.value]
    inputs = [x.float().requires_grad_(), *parameters]
    y = layer(inputs[0], training=True)
    got = [y, layer.moving_variance.value]
    got += torch.autograd.grad(y, inputs, upstream.float())
    x = inputs[0].detach().double().reshape(-1, shape[-1])
    inputs = [v.detach().double().requires_grad_() for v in (x, *parameters)]
    y, variance = in_float64(*inputs)
    upstream = upstream.float().double().reshape(x.shape)
    want = [y, variance, *torch.autograd.grad(y, inputs, upstream)]
    for mine, right in zip(got, want, strict=True):
        error = (mine.double().reshape(right.shape) - right).abs().max()
        assert error < 1e-6 * max(1.0, right.abs().max())


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_long_sums_are_differentiated_twice(center, scale, monkeypatch):
    def second(many):
        monkeypatch.setattr(rows, "MANY", many)
        layer = keras_bn.BatchNormalization(center=center, scale=scale)
        layer.build((300, 4))
        rng = np.random.default_rng(0)
        draws = (tensor(rng.normal(size=(300, 4)), "float32") for _ in range(3))
        x, upstream, weights = (each.requires_grad_() for each in draws)
        inputs = [x, *(v.value for v in layer.trainable_variables)]
        y = layer(x, training=True)
        first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
        total = (first[0] * weights).sum() + sum(v.square().sum() for v in first[1:])
        return [y, *first, *torch.autograd.grad(total, [x, upstream])]

    for mine, op in zip(second(100), second(1000), strict=True):
        np.testing.assert_allclose(mine.detach(), op.detach(), rtol=1e-4, atol=1e-4)
