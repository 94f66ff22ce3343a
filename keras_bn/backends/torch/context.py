"""What PyTorch knows of a batch, and how it runs a step."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import torch
from keras import ops

from keras_bn.backends.contract import Normalizing
from keras_bn.backends.plan import Plan
from keras_bn.backends.torch import replicas
from keras_bn.moments import Tensor


def make_plan(x: Tensor, mask: Tensor | None, settings: Normalizing) -> Plan:
    """The plan for an input; see the contract of the backends."""
    shared = settings.synchronized and replicas.sharing()
    special = mask is not None or settings.group_size is not None or shared
    # A list, for `torch.compile` does not follow a generator here.
    rows = math.prod([n for i, n in enumerate(x.shape) if i not in settings.axes])
    # The op gives the unbiased variance, which one row has not.
    fits = not special and len(settings.axes) == 1 and rows > 1
    kernel = "fused" if fits else "plain"
    return Plan(kernel, settings.axes, settings.group_size, shared)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as it is: PyTorch runs every op as it comes."""
    return function


def cond(condition: Tensor, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """`first()` where the condition holds, else `second()`."""
    return ops.cond(condition, first, second)


def prunes(x: Tensor) -> bool:
    """Whether unused results cost nothing: not on PyTorch, which runs each op."""
    return False


def traced(
    function: Callable[..., Any], variables: Sequence[keras.Variable]
) -> Callable[..., Any]:
    """`function`, without gradients; see the contract of the backends."""
    return torch.no_grad()(function)


def current_trace() -> object:
    """None: every op runs as it comes."""
    return None


def recording(loops: bool) -> AbstractContextManager[None]:
    """A context for values: every op runs as it comes."""
    return torch.no_grad()
