"""Normalizing a batch with its own statistics, by PyTorch's op where it can serve."""

import torch

from keras_bn.backends import autodiff, formulas, layout
from keras_bn.backends.plan import Plan
from keras_bn.backends.torch import planes, replicas
from keras_bn.moments import Moments, Tensor

# The op multiplies the input before it subtracts the mean, and so loses the digits that
# a large mean takes. Up to so many deviations that is a rounding error.
LARGE = 8


def forward(
    x: Tensor,
    mask: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    epsilon: float,
    plan: Plan,
) -> tuple[Tensor, Moments]:
    """Normalize a batch with its own statistics; see the contract of the backends."""
    # Sums overflow or lose digits in half precision.
    wide = x if x.dtype == torch.float64 else x.float()
    if plan.kernel == "fused":
        y, moments = _fused(wide, gamma, beta, epsilon, plan.axes[0])
    else:
        shared = replicas if plan.synchronized else None
        y, moments = autodiff.forward(
            wide, mask, gamma, beta, epsilon=epsilon, plan=plan, replicas=shared
        )
    return y.to(x.dtype), moments


def _fused(x, gamma, beta, epsilon, axis):
    """PyTorch's op; where means are large, on the input less a shift."""
    channels, image = x.shape[axis], _image(x, axis)
    # Without a scale PyTorch fails to differentiate its op twice.
    gamma = x.new_ones(channels) if gamma is None else gamma.to(x.dtype)
    beta = None if beta is None else beta.to(x.dtype)
    look = _may_look(x)
    if look:
        by_planes = planes.fits(image, gamma, beta)
        run = planes.Normalize.apply if by_planes else _op
        y, mean, variance = run(image, gamma, beta, epsilon)
    if not look or _is_large(mean, variance):
        y, mean, variance = _shifted(image, gamma, beta, epsilon)
    moments = Moments(image.numel() // channels, mean, variance)
    return y.reshape(x.shape) if y.ndim < x.ndim else y.movedim(1, axis), moments


def moments(x: Tensor, mask: Tensor | None, *, epsilon: float, plan: Plan) -> Moments:
    """The moments of a batch; see the contract of the backends."""
    if plan.kernel == "fused" and _may_look(x):
        wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
        image = _image(wide, plan.axes[0])
        mean, variance = torch.batch_norm_update_stats(image, None, None, 0.0)
        if not _is_large(mean, variance):
            return Moments(image.numel() // image.shape[1], mean, variance)
    return forward(x, mask, None, None, epsilon=epsilon, plan=plan)[1]


def _image(x, axis):
    """The input with its channels in axis 1, as the op takes them."""
    # The op takes memory in any order, so that nothing is copied.
    sequence = x.ndim == 3 and axis == 2 and x.is_contiguous()
    return x.reshape(-1, x.shape[axis]) if sequence else x.movedim(axis, 1)


def _may_look(x):
    """Whether values can be had: other devices would wait, and a graph would break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_large(mean, variance):
    """Whether any mean is so large that the op needs a shift."""
    return bool((mean * mean > LARGE**2 * variance).any())


def _op(image, gamma, beta, epsilon):
    """`(y, mean, variance)`: the output, and the statistics of the batch."""
    channels = image.shape[1]
    mean, variance = image.new_zeros(2, channels)
    y = torch.batch_norm(
        image,
        gamma,
        beta,
        mean,
        variance,
        training=True,
        momentum=1.0,  # the scratch statistics become those of the batch
        eps=epsilon,
        cudnn_enabled=torch.backends.cudnn.enabled,
    )
    n = image.numel() // channels
    # The op gives the unbiased variance.
    return y, mean, variance * ((n - 1) / n)


def _shifted(image, gamma, beta, epsilon):
    """The same, computed on the input less a shift."""
    near, rest, shifted = layout.Layout(image, (1,)).shifted(image, None)
    y, mean, variance = _op(shifted, gamma, beta, epsilon)
    mean = near + formulas.beyond(rest, mean.reshape(near.shape))
    return y, mean.reshape(-1), variance


def standardize(
    x: Tensor, mean: Tensor, scale: Tensor, beta: Tensor, plan: Plan | None = None
) -> Tensor:
    """`scale * (x - mean) + beta`; see the contract of the backends."""
    return torch.addcmul(beta, x - mean, scale)


def blend(old: Tensor, new: Tensor, usable: Tensor, momentum: float) -> Tensor:
    """Old and new values averaged; see the contract of the backends."""
    return torch.where(usable, torch.lerp(old, new, 1.0 - momentum), old)
