"""How the processes of `torch.distributed` exchange sums and updates."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.nn import functional

from keras_bn.backends import averages
from keras_bn.backends.torch import private
from keras_bn.moments import Tensor


def active() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_step() -> bool:
    """Whether this code runs in the forward pass of a `DistributedDataParallel`.

    Then every process runs it. In a group of processes alone, some may do other things,
    and an exchange would wait for them for ever.
    """
    return active() and private.active_module() is not None


def total(*values):
    """A list of tensors of one dtype, each added up over the processes.

    Gradients are added up too.
    """
    packed = torch.cat([value.reshape(-1) for value in values])
    packed = functional.all_reduce(packed, group=_group())
    parts = packed.split([math.prod(value.shape) for value in values])
    return [part.reshape(v.shape) for part, v in zip(parts, values, strict=True)]


def average_updates(
    old: Sequence[Tensor | None],
    new: Sequence[Tensor | None],
    updated: Sequence[Tensor],
) -> list[Tensor | None]:
    """Average the updates of the processes; see the contract of the backends."""
    return averages.average_updates(old, new, updated, total)


def _group():
    module = private.active_module()
    return dist.group.WORLD if module is None else module.process_group
