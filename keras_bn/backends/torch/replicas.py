"""How the processes of `torch.distributed` exchange sums and updates."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from keras_bn.backends import averages
from keras_bn.backends.torch import private
from keras_bn.moments import Tensor


def active() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_step() -> bool:
    """Whether this code runs in the forward pass of a `DistributedDataParallel`.

    Then every process runs it. In a group of processes alone, some may do other things,
    and an exchange would wait for them for ever; so may those that have no data left in
    a `join()`, which ends with the statistics of the last one for all.
    """
    return (
        active() and private.active_module() is not None and not private.may_outlast()
    )


def sharing() -> bool:
    """Whether a synchronized layer has processes to share its statistics with.

    Raises:
        ValueError: in a `join()` in which some processes may have ended.
    """
    if active() and private.may_outlast():
        raise ValueError(
            "`synchronized=True` exchanges statistics in every forward pass, which "
            "processes without data cannot answer. Received: a batch inside of "
            "`DistributedDataParallel.join()`; pass throw_on_early_termination=True to "
            "it, or train with synchronized=False"
        )
    return active()


class _Sum(torch.autograd.Function):
    """The sum of a tensor over processes; so is its gradient."""

    @staticmethod
    def forward(tensor, group):
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, upstream):
        return _Sum.apply(upstream, ctx.group), None


def total(*values):
    """A list of tensors of one dtype, each added up over the processes.

    Gradients are added up too.
    """
    return _unpacked(_Sum.apply(_packed(values), _group()), values)


def gather(*values):
    """Tensors of one dtype, each with the processes along a new leading axis."""
    group, own = _group(), _packed(values)
    packed = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(packed, own, group=group)
    each = [_unpacked(part, values) for part in packed]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def _packed(values):
    return torch.cat([value.reshape(-1) for value in values])


def _unpacked(packed, like):
    parts = packed.split([math.prod(value.shape) for value in like])
    return [part.reshape(v.shape) for part, v in zip(parts, like, strict=True)]


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
