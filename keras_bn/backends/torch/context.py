"""What PyTorch knows of a batch, and how it runs a step."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from keras import ops

from keras_bn.backends.plan import Plan
from keras_bn.backends.torch import replicas
from keras_bn.moments import Tensor


def make_plan(x, mask, settings) -> Plan:
    """The plan for an input; see the contract of the backends."""
    shared = settings.synchronized and replicas.active()
    special = mask is not None or settings.group_size is not None or shared
    # A list, for `torch.compile` does not follow a generator here.
    rows = math.prod([n for i, n in enumerate(x.shape) if i not in settings.axes])
    # The op gives the unbiased variance, which one row has not.
    fits = not special and len(settings.axes) == 1 and rows > 1
    kernel = "fused" if fits else "plain"
    return Plan(kernel, settings.axes, settings.group_size, shared)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the plan for its input; see the contract of the backends."""

    @functools.wraps(function)
    def call(x, mask, *arguments, settings):
        x = ops.convert_to_tensor(x)
        plan = make_plan(x, mask, settings)
        return function(x, mask, *arguments, settings=settings, plan=plan)

    return call


def cond(condition: Tensor, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """`first()` where the condition holds, else `second()`."""
    return ops.cond(condition, first, second)


def pruned(x) -> bool:
    """Whether what nothing uses is left out: no, each op runs as it comes."""
    return False


def watched(loops: bool):
    """A context for values: every op runs as it comes."""
    return torch.no_grad()


def retrack(layer):
    """Tell the PyTorch module that a Keras layer is which parameters it has."""
    if "_torch_params" in vars(layer).get("_modules", {}):
        layer._track_variables()
