"""Normalizing a batch with its own statistics, by PyTorch's op where it can serve."""

import math

import torch

from keras_bn.kernels import autodiff, layout
from keras_bn.kernels.plan import Plan
from keras_bn.kernels.torch import replicas
from keras_bn.moments import Moments, Tensor


def forward(
    x, mask, gamma, beta, *, epsilon: float, plan: Plan
) -> tuple[Tensor, Moments]:
    """Normalize a batch with its own statistics; see the contract of the kernels."""
    # Sums overflow or lose digits in half precision.
    wide = x if x.dtype == torch.float64 else x.float()
    if plan.kernel == "fused":
        y, moments = _fused(wide, gamma, beta, epsilon, plan.axes[0])
    else:
        total = replicas.total if plan.synchronized else None
        how = {"epsilon": epsilon, "plan": plan, "total": total}
        y, moments = autodiff.forward(wide, mask, gamma, beta, **how)
    return y.to(x.dtype), moments


def _fused(x, gamma, beta, epsilon, axis):
    """PyTorch's op on the input less a shift near its mean, which is added back.

    The op multiplies the input before it subtracts the mean, and so would lose digits
    where means are large. It takes memory in any order, so `movedim` copies nothing.
    """
    channels = x.shape[axis]
    sequence = x.ndim == 3 and axis == 2
    image = x.reshape(-1, channels) if sequence else x.movedim(axis, 1)
    rows = [i for i in range(image.ndim) if i != 1]
    each = math.prod(image.shape[2:])
    few = image.detach()[: -(-layout.SHIFT_ROWS // each)]
    shift = few.mean(rows, keepdim=True)
    gamma, beta = (v if v is None else v.to(x.dtype) for v in (gamma, beta))
    mean, variance = x.new_zeros(2, channels)
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
    # The op gives the unbiased variance, and keeps what it gave.
    moments = Moments(n, mean + shift.reshape(-1), variance * ((n - 1) / n))
    return y.reshape(x.shape) if sequence else y.movedim(1, axis), moments


def standardize(x, mean, scale, beta):
    """`scale * (x - mean) + beta`; see the contract of the kernels."""
    return torch.addcmul(beta, x - mean, scale)
