"""Normalizing a batch with its own statistics, by the kernel of its plan."""

import math

import torch

from keras_bn.kernels import autodiff, layout
from keras_bn.kernels.plan import Plan
from keras_bn.kernels.torch import replicas
from keras_bn.kernels.torch.centred import Normalized
from keras_bn.moments import Moments, Tensor


def forward(
    x, mask, gamma, beta, *, epsilon: float, plan: Plan
) -> tuple[Tensor, Moments]:
    """Normalize a batch with its own statistics; see the contract of the kernels."""
    # Sums overflow or lose digits in half precision.
    wide = x if x.dtype == torch.float64 else x.float()
    by_kernel = {"fused": _fused, "centred": _centred, "plain": _formulas}
    y, moments = by_kernel[plan.kernel](wide, mask, gamma, beta, epsilon, plan)
    return y.to(x.dtype), Moments(*(value.detach() for value in moments))


def _centred(x, mask, gamma, beta, epsilon, plan):
    lay = layout.Layout(x, plan.axes)
    rows = [i for i in range(x.ndim) if i not in plan.axes]
    shift = x.detach().mean(rows, keepdim=True)
    gamma, beta = lay.parameter(gamma, 1.0, x.dtype), lay.parameter(beta, 0.0, x.dtype)
    y, rest, variance = Normalized.apply(x - shift, gamma, beta, epsilon, rows)
    count = torch.as_tensor(x.numel() // shift.numel())
    mean, variance = lay.statistic(shift + rest), lay.statistic(variance)
    return y, Moments(count, mean, variance)


def _fused(x, mask, gamma, beta, epsilon, plan):
    """PyTorch's op on the input less a shift near its mean, which is added back.

    The op multiplies the input before it subtracts the mean, and so would lose digits
    where means are large. It takes memory in any order, so `movedim` copies nothing.
    """
    (axis,) = plan.axes
    image = x.movedim(axis, 1)
    rows = [i for i in range(x.ndim) if i != 1]
    each = math.prod(image.shape[2:])
    few = image.detach()[: -(-layout.SHIFT_ROWS // each)]
    shift = few.mean(rows, keepdim=True)
    gamma, beta = (v if v is None else v.to(x.dtype) for v in (gamma, beta))
    mean, variance = x.new_zeros(2, x.shape[axis])
    y = torch.batch_norm(
        image - shift,
        gamma,
        beta,
        mean,
        variance,
        training=True,
        momentum=1.0,  # the scratch statistics become those of the batch
        eps=epsilon,
        cudnn_enabled=torch.backends.cudnn.enabled,
    )
    n = image.shape[0] * each
    population = variance * ((n - 1) / n)
    moments = Moments(torch.as_tensor(n), mean + shift.reshape(-1), population)
    return y.movedim(1, axis), moments


def _formulas(x, mask, gamma, beta, epsilon, plan):
    if plan.group_size is None:
        lay = layout.Layout(x, plan.axes)
    else:
        lay = layout.Grouped(x, plan.axes, plan.group_size)
    y, moments = autodiff.forward(
        x,
        lay.mask(mask, x),
        lay.parameter(gamma, 1.0, x.dtype),
        lay.parameter(beta, 0.0, x.dtype),
        epsilon=epsilon,
        layout=lay,
        total=replicas.total if plan.synchronized else None,
    )
    return y, Moments(*(lay.statistic(value) for value in moments))
