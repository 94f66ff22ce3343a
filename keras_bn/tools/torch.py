"""Batch normalizations from PyTorch, and back.

Where the two conventions meet: PyTorch's momentum is the weight of the new value,
Keras's of the old one; PyTorch's moving variance takes in the unbiased variance of the
batch; PyTorch's epsilon is 1e-5 by default; its channels are on axis 1.
"""

from collections.abc import Mapping

import numpy as np

from keras_bn.layer import BatchNormalization

_RANKS = {"BatchNorm1d": 2, "BatchNorm2d": 4, "BatchNorm3d": 5}


def from_torch(module, axis=1, *, rank=None, prefix="", eps=None, momentum=None):
    """A layer that goes on where a batch normalization of PyTorch stands.

    It has the module's weights and statistics, gives the same outputs, and trains on
    as the module would: with the unbiased variance in its moving variance, and with
    the plain mean over all batches for `momentum=None`.

    Args:
        module: `torch.nn.BatchNorm1d`, `2d`, `3d` or `SyncBatchNorm`; or a state dict,
            of a whole model if `prefix` says which part.
        axis: the channel axis of the layer's inputs; 1 as in PyTorch, or -1 as is
            usual in Keras.
        rank: how many axes the inputs have. By default 2, 4 or 5, as the module's
            class says: give 3 for sequences in `BatchNorm1d`. A `SyncBatchNorm` and a
            state dict don't say, so there it must be given.
        prefix: what the names in a state dict begin with, such as `"layer1.0.bn1."`.
        eps, momentum: for a state dict, which doesn't hold them: PyTorch's arguments,
            1e-5 and 0.1 by default.

    Returns:
        A built `keras_bn.BatchNormalization`.

    Raises:
        TypeError: for what is neither such a module nor a state dict.
        ValueError: for a module without running statistics, which has no counterpart
            here: it normalizes by the batch in evaluation too; for a state dict
            without them; and if `rank` is needed.

    Example:

    >>> import keras_bn, torch
    >>> layer = keras_bn.from_torch(torch.nn.BatchNorm2d(3), axis=-1)
    >>> layer.momentum, layer.epsilon, layer.unbiased, layer.moving_mean.shape[0]
    (0.9, 1e-05, True, 3)
    """
    if isinstance(module, Mapping):
        state = {k[len(prefix) :]: v for k, v in module.items() if k.startswith(prefix)}
        name, synchronized = "a state dict", False
        eps = 1e-5 if eps is None else eps
        momentum = 0.1 if momentum is None else momentum
    else:
        _check_module(module, eps, momentum)
        state, name = dict(module.state_dict()), type(module).__name__
        synchronized = name == "SyncBatchNorm"
        eps, momentum = module.eps, module.momentum
    if state.get("running_mean") is None or state.get("running_var") is None:
        raise ValueError(
            f"{name} has no running statistics{_under(prefix)}: it normalizes by the "
            "batch in evaluation too, for which there is no layer here."
        )
    rank = _RANKS.get(name) if rank is None else rank
    if rank is None:
        raise ValueError(f"`rank` must be given for {name}: the axes of the inputs.")
    arrays = {key: _array(value) for key, value in state.items()}
    layer = BatchNormalization(
        axis=axis,
        momentum=None if momentum is None else _other(momentum),
        epsilon=eps,
        center="bias" in arrays,
        scale="weight" in arrays,
        synchronized=synchronized,
        unbiased=True,
        dtype="float64" if arrays["running_mean"].dtype == "float64" else None,
    )
    shape: list[int | None] = [None] * rank
    shape[axis] = len(arrays["running_mean"])
    layer.build(tuple(shape))
    _assign(layer.gamma, arrays.get("weight"), getattr(module, "weight", None))
    _assign(layer.beta, arrays.get("bias"), getattr(module, "bias", None))
    layer.moving_mean.assign(arrays["running_mean"])
    layer.moving_variance.assign(arrays["running_var"])
    batches = int(arrays.get("num_batches_tracked", 0))
    if layer.updates is not None:
        layer.updates.assign(np.full(layer.updates.shape, batches))
    # At a fixed momentum the count says nothing; it is kept for the way back.
    layer.torch_batches = batches
    return layer


def to_torch(layer):
    """A module of PyTorch that goes on where a layer stands.

    The inverse of `from_torch`: back comes the same state dict. A layer that isn't
    `unbiased` gives the same outputs there, but its running variance will take in
    unbiased variances from then on, as PyTorch's always do.

    Args:
        layer: a built `keras_bn.BatchNormalization`, over one channel axis.

    Returns:
        A `torch.nn.BatchNorm1d`, `2d` or `3d`, by the rank of the layer's inputs, or a
        `SyncBatchNorm` if it is synchronized. It expects the channels on axis 1,
        wherever the layer has them.

    Raises:
        TypeError: for anything but a layer of ours.
        ValueError: for a layer that isn't built, or has options that PyTorch lacks.

    Example:

    >>> import keras_bn, torch
    >>> module = torch.nn.BatchNorm1d(4)
    >>> again = keras_bn.to_torch(keras_bn.from_torch(module))
    >>> all(torch.equal(v, again.state_dict()[k])
    ...     for k, v in module.state_dict().items())
    True
    """
    import torch

    if not isinstance(layer, BatchNormalization):
        raise TypeError(f"Expected a keras_bn.BatchNormalization. Received: {layer!r}")
    if not layer.built:
        raise ValueError(f"'{layer.name}' is not built: it has no weights yet.")
    _check_expressible(layer)
    rank = layer.input_spec.ndim
    classes = {"1d": (2, 3), "2d": (4,), "3d": (5,)}
    suffix = [suffix for suffix, ranks in classes.items() if rank in ranks]
    if not suffix and not layer.synchronized:
        raise ValueError(
            f"PyTorch has no batch normalization for inputs of rank {rank}."
        )
    name = "SyncBatchNorm" if layer.synchronized else f"BatchNorm{suffix[0]}"
    channels = layer.moving_mean.shape[0]
    module = getattr(torch.nn, name)(
        channels,
        eps=layer.epsilon,
        momentum=None if layer.momentum is None else _other(layer.momentum),
        affine=layer.center or layer.scale,
        dtype=getattr(torch, layer.moving_mean.dtype),
    )
    if layer.updates is None:
        batches = getattr(layer, "torch_batches", 0)
    else:
        batches = layer.updates.numpy().max()
    state = {
        "running_mean": layer.moving_mean.numpy(),
        "running_var": layer.moving_variance.numpy(),
        "num_batches_tracked": np.asarray(batches),
    }
    if module.affine:
        # PyTorch has both or none: the missing one is fixed where it does nothing.
        pairs = {"weight": (layer.gamma, np.ones), "bias": (layer.beta, np.zeros)}
        for key, (variable, fixed) in pairs.items():
            present = variable is not None
            value = variable.numpy() if present else fixed(channels)
            state[key] = value
            getattr(module, key).requires_grad_(present and variable.trainable)
    with torch.no_grad():
        target = module.state_dict()
        for key, value in state.items():
            target[key].copy_(torch.as_tensor(np.array(value)))
    return module


def _check_module(module, eps, momentum):
    import torch

    if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        raise TypeError(
            "Expected a batch normalization of torch.nn, or a state dict. Received: "
            f"{module!r}"
        )
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        raise ValueError("The module is lazy: run it once, so that it has weights.")
    if eps is not None or momentum is not None:
        raise ValueError("`eps` and `momentum` are for state dicts; a module has them.")


def _check_expressible(layer):
    lacking = {
        "axis": isinstance(layer.axis, list),
        "renorm": layer.renorm,
        "virtual_batch_size": layer.virtual_batch_size is not None,
        "debias": layer.debias and layer.momentum is not None,
        "freeze_statistics": layer.freeze_statistics,
    }
    refused = [
        f"{name}={getattr(layer, name)!r}" for name, yes in lacking.items() if yes
    ]
    if refused:
        raise ValueError(
            f"PyTorch's batch normalization has no equivalent of {', '.join(refused)} "
            f"in '{layer.name}'."
        )


def _assign(variable, value, parameter):
    if variable is not None:
        variable.assign(value)
        if parameter is not None and not parameter.requires_grad:
            variable.trainable = False


def _array(value):
    """A tensor of PyTorch, or an array, as an array of at least float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.element_size() < 4 else value
        value = value.numpy()
    return np.asarray(value)


def _other(momentum):
    """The weight of the other of old and new value, without rounding noise."""
    return round(1.0 - momentum, 12)


def _under(prefix):
    return f" under '{prefix}'" if prefix else ""
