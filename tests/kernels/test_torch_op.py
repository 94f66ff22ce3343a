"""PyTorch's op: when it is computed on a shifted input, and what it keeps."""

import numpy as np
import pytest
from support import backend
from support.backend import tensor

import keras_bn

if backend.NAME != "torch":
    pytest.skip("torch only: its op", allow_module_level=True)

import torch

from keras_bn.kernels.torch import batch


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


@pytest.mark.parametrize("shape", [(64, 8), (4, 6, 6, 8), (5, 7, 8)])
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


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_the_op_is_differentiated_twice_with_any_parameters(center, scale):
    def second(forward):
        rng = np.random.default_rng(0)
        draws = (tensor(rng.normal(size=(30, 4)), "float64") for _ in range(3))
        x, upstream, weights = (each.requires_grad_() for each in draws)
        gamma, beta = (
            torch.full((4,), 2.0, dtype=x.dtype, requires_grad=True) if there else None
            for there in (scale, center)
        )
        inputs = [v for v in (x, gamma, beta) if v is not None]
        y = forward(x, gamma, beta)
        first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
        total = (first[0] * weights).sum() + sum(v.square().sum() for v in first[1:])
        return [y, *first, *torch.autograd.grad(total, [x, upstream])]

    def fused(x, gamma, beta):
        return batch._fused(x, gamma, beta, 1e-3, 1)[0]

    def written_out(x, gamma, beta):
        d = x - x.mean(0)
        y = d / torch.sqrt((d * d).mean(0) + 1e-3)
        y = y if gamma is None else y * gamma
        return y if beta is None else y + beta

    for got, want in zip(second(fused), second(written_out), strict=True):
        np.testing.assert_allclose(got.detach(), want.detach(), rtol=1e-9, atol=1e-9)
