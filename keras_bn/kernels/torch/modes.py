"""The ways PyTorch runs a function: eagerly, or compiled."""

import torch
from keras import ops

MODES = ("eager", "graph")
VERSION = torch.__version__


def in_mode(function, mode, signature=None):
    """`function`, run in one of the `MODES`; see the contract of the kernels.

    "graph" is `torch.compile`, without a graph break. It wants no signature.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
    return function if mode == "eager" else torch.compile(function, fullgraph=True)


def with_gradients(function, variables, mode, signature=None):
    """`function` and its vector-Jacobian products; see the contract of the kernels."""
    values = [variable.value for variable in variables]
    forward = in_mode(function, mode, signature)

    def run(x, upstream):
        x = ops.convert_to_tensor(x).detach().requires_grad_()
        y = forward(x)
        upstream = ops.convert_to_tensor(upstream)
        return y.detach(), list(torch.autograd.grad(y, [x, *values], upstream))

    return run


def device() -> str:
    """Where Keras puts tensors: "CPU:0", or "GPU:0 (its name)"."""
    where = ops.zeros([]).device
    if where.type != "cuda":
        return f"{where.type.upper()}:{where.index or 0}"
    return f"GPU:{where.index} ({torch.cuda.get_device_name(where)})"
