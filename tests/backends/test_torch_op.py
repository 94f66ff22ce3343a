"""PyTorch's op: when it is computed on a shifted input or by planes, what it keeps."""

import numpy as np
import pytest
from support import backend
from support.backend import tensor
from support.steps import Step, oracle_step, relative_error, set_parameters

import keras_bn

if backend.NAME != "torch":
    pytest.skip("torch only: its op", allow_module_level=True)

import torch

from keras_bn.backends.plan import Plan
from keras_bn.backends.torch import batch, planes


def layer_on(x, **options):
    layer = keras_bn.BatchNormalization(**options)
    layer.build(x.shape)
    return layer


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((64, 8), -1), ((4, 6, 6, 8), -1), ((5, 7, 8), -1), ((32, 16, 16, 17), 1)],
)
@pytest.mark.parametrize("mean", [0.0, 5.0, 20.0, 1e4])
def test_one_activation_is_kept(shape, axis, mean):
    """The input itself, which is there anyway; or the input less a large mean."""
    rng = np.random.default_rng(0)
    x = tensor(rng.normal(mean, 1, shape), "float32").requires_grad_()
    layer = layer_on(x, axis=axis)
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
    assert (large[0].data_ptr() == x.data_ptr()) == (mean < batch.LARGE)
    y.sum().backward()


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((32, 16, 16, 17), True),
        ((8, 64, 300), True),
        ((4, 2, 8, 16, 128), True),
        ((4, 4, 8, 16), False),  # small
        ((512, 64, 2, 2), False),  # tiny planes
        ((1, 4, 40_000), False),  # long ones
    ],
)
def test_by_planes_where_that_is_faster(shape, fits):
    x = tensor(np.random.default_rng(0).normal(size=shape), "float32")
    gamma, beta = torch.ones(shape[1]), torch.zeros(shape[1])
    last = x.movedim(1, -1)
    # The order in memory decides, not that of the axes.
    for image, expected in (
        (x, fits),
        (last.movedim(-1, 1), fits),
        (last.contiguous().movedim(-1, 1), False),
    ):
        assert planes.fits(image, gamma, beta) == expected
    layers = keras_bn.BatchNormalization(axis=1), keras_bn.BatchNormalization()
    y = layers[0](x, training=True)
    beside = layers[1](last.contiguous(), training=True).movedim(-1, 1)
    np.testing.assert_allclose(y.detach(), beside.detach(), rtol=1e-5, atol=1e-5)
    for one, other in zip(*(layer.weights for layer in layers), strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 5.0, 1e4])
@pytest.mark.parametrize("shape", [(32, 16, 16, 17), (8, 4, 128, 128)])
def test_planes_against_the_oracle(shape, mean):
    rng = np.random.default_rng(0)
    c = shape[1]
    gamma, beta = rng.uniform(0.5, 2, c), rng.normal(size=c)
    x, upstream = rng.normal(mean, 1, shape), rng.normal(size=shape)
    layer = layer_on(x, axis=1, momentum=0.0)
    set_parameters(layer, gamma, beta)
    got = Step(layer)(x, upstream)
    want = oracle_step(layer, x, upstream, (1,), gamma, beta)
    for name, value in want.items():
        assert relative_error(got[name], value) < 2e-6, name


def test_forward_mode_by_planes():
    """The op's derivative along a direction is that of its backward pass."""
    fw = torch.autograd.forward_ad
    rng = np.random.default_rng(0)
    draws = (tensor(rng.normal(size=(32, 16, 16, 17)), "float64") for _ in range(3))
    x, direction, upstream = draws
    layer = layer_on(x, axis=1, dtype="float64")
    with fw.dual_level():
        y = layer(fw.make_dual(x, direction), training=True)
        along = (fw.unpack_dual(y).tangent * upstream).sum()
    x = x.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x, training=True), [x], upstream)
    np.testing.assert_allclose(along.detach(), (dx * direction).sum(), rtol=1e-9)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("shape", [(30, 4), (3, 4, 5, 5), (32, 4, 32, 33)])
def test_the_op_is_differentiated_twice_with_any_parameters(shape, center, scale):
    """The last of these shapes by planes."""
    rows = [0, *range(2, len(shape))]

    def per_channel(value):
        return value.reshape(-1, *[1] * (len(shape) - 2))

    def second(forward):
        rng = np.random.default_rng(0)
        draws = (tensor(rng.normal(size=shape), "float64") for _ in range(3))
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
        plan = Plan("fused", axes=(1,))
        return batch.forward(x, None, gamma, beta, epsilon=1e-3, plan=plan)[0]

    def written_out(x, gamma, beta):
        d = x - x.mean(rows, keepdim=True)
        y = d / torch.sqrt((d * d).mean(rows, keepdim=True) + 1e-3)
        y = y if gamma is None else y * per_channel(gamma)
        return y if beta is None else y + per_channel(beta)

    for got, want in zip(second(fused), second(written_out), strict=True):
        np.testing.assert_allclose(got.detach(), want.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (8, 16, 33, 33)])
@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.add_(1),
        lambda y: torch.nn.ReLU(inplace=True)(y),
        lambda y: y.mul_(2).clamp_(max=1.5),
    ],
    ids=["add", "relu", "mul and clamp"],
)
def test_an_output_may_be_changed_in_place(shape, masked, change):
    """Below 2**17 elements and above, by planes or not."""
    rng = np.random.default_rng(0)
    x, upstream = (tensor(rng.normal(2, 1, shape), "float64") for _ in range(2))
    mask = None
    if masked:
        mask = torch.as_tensor(rng.random((shape[0], *shape[2:])) < 0.6)
    steps = []
    for before in (lambda y: y, torch.clone):
        layer = layer_on(x, axis=1, momentum=0.0, dtype="float64")
        inputs = x.clone().requires_grad_()
        parameters = [inputs, *(v.value for v in layer.trainable_variables)]
        y = change(before(layer(inputs, training=True, mask=mask)))
        found = torch.autograd.grad(y, parameters, upstream)
        steps.append([y, *found, *(v.value for v in layer.weights)])
    for got, want in zip(*steps, strict=True):
        np.testing.assert_allclose(got.detach(), want.detach(), rtol=1e-12, atol=1e-12)
