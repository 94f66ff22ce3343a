"""The way PyTorch runs a function: eagerly."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from keras import ops

from keras_bn.backends.contract import Signature

MODES = ("eager",)
USUAL = "eager"
SUMS_IN_ORDER = True
VERSION = torch.__version__


def in_mode(
    function: Callable[..., Any],
    variables: Sequence[Any],
    mode: str,
    signature: Signature | None = None,
) -> Callable[..., Any]:
    """`function`, run in one of the `MODES`; see the contract of the backends."""
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
    return function


def with_gradients(
    function: Callable[..., Any],
    variables: Sequence[Any],
    mode: str,
    signature: Signature | None = None,
) -> Callable[..., Any]:
    """`function` and its vector-Jacobian products; see the contract of the backends."""
    function = in_mode(function, variables, mode)
    values = [variable.value for variable in variables if variable.trainable]

    def run(x, upstream):
        x = ops.convert_to_tensor(x).detach().requires_grad_()
        y = function(x)
        upstream = ops.convert_to_tensor(upstream)
        return y.detach(), list(torch.autograd.grad(y, [x, *values], upstream))

    return run


def wait(result: Any) -> Any:
    """The result, when it has been computed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def device() -> str:
    """Where Keras puts tensors: "CPU:0", or "GPU:0 (its name)"."""
    where = ops.zeros([]).device
    if where.type != "cuda":
        return f"{where.type.upper()}:{where.index or 0}"
    return f"GPU:{where.index} ({torch.cuda.get_device_name(where)})"
