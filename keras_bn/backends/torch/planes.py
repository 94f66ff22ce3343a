"""Images whose channels come first in memory, one plane per sample and channel.

PyTorch's op takes most of its forward pass there for the statistics, one element after
another. Sums over planes are ten times as fast. The backward pass is the op's.
"""

import math

import torch
from torch.autograd.forward_ad import unpack_dual

from keras_bn.backends.torch import private

# Elements from which it pays: a gradient of its own takes 0.04 ms to start.
FROM = 2**17

# Elements of a plane. Shorter ones take as long as in the op, and of longer ones the
# norm would lose digits.
SHORTEST, LONGEST = 16, 2**14


def fits(image, gamma, beta) -> bool:
    """Whether an image, `(batch, channels, ...)`, is to be normalized here."""
    if image.numel() < FROM or not image.is_contiguous():
        return False
    if private.batch_norm_backward is None:
        return False
    # The op is differentiated in forward mode, which is not written out here.
    tensors = (image, gamma) if beta is None else (image, gamma, beta)
    forward_mode = any(unpack_dual(each).tangent is not None for each in tensors)
    return SHORTEST <= math.prod(image.shape[2:]) <= LONGEST and not forward_mode


class Normalize(torch.autograd.Function):
    """Normalize an image with its own statistics.

    Args of `apply`:
        image: as `fits` wants it, on a CPU, of float32 or float64.
        gamma, beta: scale, and offset or None.
        epsilon: added to the variance.

    Returns:
        `(y, mean, variance)`, the statistics without gradient.
    """

    @staticmethod
    def forward(image, gamma, beta, epsilon):
        channels = image.shape[1]
        n = image.numel() // channels
        mean = image.view(len(image), channels, -1).sum((0, 2)) / n
        # No view of another tensor, which could not be changed in place.
        y = torch.empty_like(image)
        planes = y.view(len(image), channels, -1)
        torch.sub(image.view(planes.shape), mean[:, None], out=planes)
        variance = torch.linalg.vector_norm(planes, dim=2).square().sum(0) / n
        planes *= (gamma * torch.rsqrt(variance + epsilon))[:, None]
        if beta is not None:
            planes += beta[:, None]
        return y, mean, variance

    @staticmethod
    def setup_context(ctx, inputs, output):
        image, gamma, _, epsilon = inputs
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(image, gamma, mean, variance)
        ctx.epsilon = epsilon

    @staticmethod
    def backward(ctx, upstream, *_):
        image, gamma, mean, variance = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        statistics = None, None, mean, torch.rsqrt(variance + ctx.epsilon)
        gradients = private.batch_norm_backward(
            upstream, image, gamma, *statistics, True, ctx.epsilon, wanted
        )
        return *gradients, None
