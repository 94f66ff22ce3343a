"""Every private name of PyTorch that is used, each once, and what goes without it."""

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

# The backward pass of batch normalization. Without it, images with their channels first
# are normalized by PyTorch's op, which is slower.
batch_norm_backward: Any = getattr(torch.ops.aten, "native_batch_norm_backward", None)


def active_module() -> Any:
    """The `DistributedDataParallel` whose forward pass this code runs in, or None.

    Without the private name it is not known, and replicas do not average what they
    have learned of moving statistics.
    """
    ask = getattr(DistributedDataParallel, "_get_active_ddp_module", None)
    return None if ask is None else ask()


def may_outlast() -> bool:
    """Whether this code runs in a `join()`, in which other processes may have ended.

    Without the private name it is not known; gloo then ends the processes.
    """
    join = getattr(active_module(), "_join_config", None)
    return join is not None and join.enable and not join.throw_on_early_termination
