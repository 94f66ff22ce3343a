"""Batch normalizations from PyTorch, and back.

The conventions differ: PyTorch's momentum is the weight of the new value, Keras's of
the old one. PyTorch's moving variance uses the unbiased variance of the batch. Its
default epsilon is 1e-5, and its channels are on axis 1.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_bn.layer import BatchNormalization, arguments
from keras_bn.surgery import norms

_RANKS = {"BatchNorm1d": 2, "BatchNorm2d": 4, "BatchNorm3d": 5}
_AFFINE = {"gamma": "weight", "beta": "bias"}
_STATISTICS = {"moving_mean": "running_mean", "moving_variance": "running_var"}


def from_torch(
    module: Any,
    axis: int = 1,
    *,
    rank: int | None = None,
    prefix: str = "",
    eps: float | None = None,
    momentum: float | None = None,
) -> BatchNormalization:
    """A layer with the state of a PyTorch batch normalization.

    It has the module's weights and statistics, gives the same outputs, and trains as
    the module would: with the unbiased variance in its moving variance, and with the
    plain mean over all batches for `momentum=None`.

    Args:
        module: `torch.nn.BatchNorm1d`, `2d`, `3d` or `SyncBatchNorm`, or a subclass
            without its own `forward`; a frozen one, as torchvision's
            `FrozenBatchNorm2d`, which has buffers in place of parameters; or a state
            dict, of a whole model if `prefix` says which part.
        axis: the channel axis of the layer's inputs; 1 as in PyTorch, or -1 as is
            usual in Keras.
        rank: how many axes the inputs have: 2, 4 or 5 by default, from the module's
            class. Give 3 for sequences in `BatchNorm1d`. It is required for a
            `SyncBatchNorm` and a state dict.
        prefix: what the names in a state dict begin with, such as `"layer1.0.bn1."`.
        eps, momentum: PyTorch's arguments, 1e-5 and 0.1 by default. Only for a state
            dict, which does not contain them.

    Returns:
        A built `keras_bn.BatchNormalization`. A parameter with `requires_grad=False`
        is frozen in the layer (`freeze_affine`). A module without running statistics
        gives a layer with `adapt_prior=0`, which normalizes by the batch always. All of
        the layer is frozen for a frozen module, and for a state dict without
        `num_batches_tracked` and `momentum`: what does not count batches does not train
        on them.
        `keras_bn.unfreeze(layer, affine=True)` lets it train.

    Raises:
        TypeError: for anything but such a module or a state dict.
        ValueError: for a module that computes something else (its own `forward`,
            hooks, parametrizations); for a state dict without running statistics under
            `prefix`; for an `axis` outside of `rank`; and if `rank` is missing.

    Example:

    >>> import keras_bn, torch
    >>> layer = keras_bn.from_torch(torch.nn.BatchNorm2d(3), axis=-1)
    >>> layer.momentum, layer.epsilon, layer.unbiased, layer.moving_mean.shape[0]
    (0.9, 1e-05, True, 3)
    """
    if isinstance(module, Mapping):
        state, name, kind = _part(module, prefix), "a state dict", ""
        frozen = momentum is None and state.get("num_batches_tracked") is None
        eps = 1e-5 if eps is None else eps
        momentum = 0.1 if momentum is None else momentum
    elif frozen := _is_frozen(module):
        state, name, kind = dict(module.state_dict()), type(module).__name__, ""
        rank = 4 if rank is None else rank
        eps, momentum = getattr(module, "eps", 1e-5 if eps is None else eps), 0.1
        _check_frozen(module, eps, rank)
    else:
        kind = _kind(module, eps, momentum)
        state, name = dict(module.state_dict()), type(module).__name__
        eps, momentum = module.eps, module.momentum
    rank = _RANKS.get(kind) if rank is None else rank
    if rank is None:
        raise ValueError(f"`rank` must be given for {name}: the rank of the inputs.")
    arrays = {key: _array(value) for key, value in state.items()}
    # Without running statistics it normalizes by the batch in evaluation, too.
    tracks = "running_mean" in arrays
    mean = arrays["running_mean"] if tracks else np.zeros(module.num_features)
    double = "float64" in {str(value.dtype) for value in arrays.values()}
    shape = _shape(rank, axis, len(mean))
    fixed = [ours for ours, theirs in _AFFINE.items() if _fixed(module, theirs)]
    layer = BatchNormalization(
        axis=axis,
        momentum=None if momentum is None else _other(momentum),
        epsilon=eps,
        center="bias" in arrays,
        scale="weight" in arrays,
        synchronized=kind == "SyncBatchNorm",
        unbiased=True,
        freeze_statistics=frozen,
        freeze_affine=frozen or (fixed[0] if len(fixed) == 1 else bool(fixed)),
        adapt_prior=None if tracks else 0,
        dtype="float64" if double else None,
    )
    layer.build(shape)
    for ours, theirs in (*_AFFINE.items(), *_STATISTICS.items()):
        if theirs in arrays:
            getattr(layer, ours).assign(arrays[theirs])
    batches = int(arrays.get("num_batches_tracked", 0))
    if layer.updates is not None:
        layer.updates.assign(np.full(layer.updates.shape, batches))
    # Only `to_torch` needs the count if momentum is fixed.
    layer.torch_batches = batches
    return layer


def to_torch(layer: BatchNormalization) -> Any:
    """A PyTorch module with the state of a layer.

    The inverse of `from_torch`: it gives the same state dict back. A layer that isn't
    `unbiased` gives the same outputs there, but further training will use unbiased
    variances, as always in PyTorch.

    Args:
        layer: a built `keras_bn.BatchNormalization`, over one channel axis.

    Returns:
        A `torch.nn.BatchNorm1d`, `2d` or `3d`, by the rank of the layer's inputs, or a
        `SyncBatchNorm` if it is synchronized. Its channels are on axis 1, wherever the
        layer has them.

    Raises:
        TypeError: for anything but a `keras_bn.BatchNormalization`.
        ValueError: for a layer that isn't built, has options that PyTorch lacks, or is
            of a subclass with its own `call`.

    Example:

    >>> import keras_bn, torch
    >>> module = torch.nn.BatchNorm1d(4)
    >>> again = keras_bn.to_torch(keras_bn.from_torch(module))
    >>> all(torch.equal(v, again.state_dict()[k])
    ...     for k, v in module.state_dict().items())
    True
    """
    import torch

    norms.check_layer(layer)
    if not isinstance(layer, BatchNormalization):
        raise TypeError(f"Expected a keras_bn.BatchNormalization. Received: {layer!r}")
    if norms.computes_otherwise(layer):
        raise ValueError(
            f"{type(layer).__name__} has a `call` of its own, which a PyTorch module "
            f"would not have. Received: layer '{layer.name}'"
        )
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
    kind = getattr(torch.nn, name)
    # PyTorch has no layer with a bias alone, and older releases none without a bias.
    missing = layer.scale and not layer.center
    without = missing and "bias" in inspect.signature(kind).parameters
    module = kind(
        channels,
        eps=layer.epsilon,
        momentum=None if layer.momentum is None else _other(layer.momentum),
        affine=layer.center or layer.scale,
        track_running_stats=not layer.adapts,
        dtype=getattr(torch, layer.moving_mean.dtype),
        **({"bias": False} if without else {}),
    )
    if layer.updates is None:
        batches = getattr(layer, "torch_batches", 0)
    else:
        batches = ops.convert_to_numpy(layer.updates).max()
    state = {"num_batches_tracked": np.asarray(batches)}
    for ours, theirs in _STATISTICS.items():
        state[theirs] = ops.convert_to_numpy(getattr(layer, ours))
    if layer.adapts:
        state = {}
    if module.affine:
        # A parameter that the layer does not have is fixed at 1 or 0.
        for (ours, theirs), fixed in zip(_AFFINE.items(), (1.0, 0.0), strict=True):
            if getattr(module, theirs) is None:
                continue
            variable = getattr(layer, ours)
            present = variable is not None
            state[theirs] = np.full(channels, fixed)
            if present:
                state[theirs] = ops.convert_to_numpy(variable)
            getattr(module, theirs).requires_grad_(present and variable.trainable)
    with torch.no_grad():
        target = module.state_dict()
        for key, value in state.items():
            target[key].copy_(torch.as_tensor(np.array(value)))
    return module


def _is_frozen(module):
    """Whether a module has the state of a batch normalization in buffers alone."""
    if not hasattr(module, "named_buffers") or any(True for _ in module.parameters()):
        return False
    names = {name for name, _ in module.named_buffers()} - {"num_batches_tracked"}
    return names == {*_AFFINE.values(), *_STATISTICS.values()}


def _check_frozen(module, eps, rank):
    """Refuse a module that computes something else than its buffers say."""
    import torch

    buffers = {n: _array(b).astype("float64") for n, b in module.named_buffers()}
    channels = len(buffers["running_mean"])
    shape = (1, channels, *[1] * (rank - 2))
    mean, variance, gamma, beta = (
        buffers[name].reshape(shape)
        for name in (*_STATISTICS.values(), *_AFFINE.values())
    )
    spread = np.sqrt(variance + eps)
    noise = np.random.default_rng(0).normal(size=(2, channels, *[3] * (rank - 2)))
    x = torch.as_tensor(mean + spread * noise, dtype=module.running_mean.dtype)
    with torch.no_grad():
        y = _array(module(x)).astype("float64")
    expected = (_array(x) - mean) / spread * gamma + beta
    precision = torch.finfo(x.dtype).eps ** 0.5
    scale = np.abs(gamma) * (1 + np.abs(mean) / spread) + np.abs(beta)
    if y.shape != x.shape or np.any(np.abs(y - expected) > precision * (1e-6 + scale)):
        raise ValueError(
            f"{type(module).__name__} does not compute (x - running_mean) / "
            f"sqrt(running_var + {eps:g}) * weight + bias. If its epsilon is another, "
            "pass `eps`."
        )


def _kind(module, eps, momentum):
    """The name of the torch.nn class of a module, without any subclass."""
    import torch

    bases = {name: getattr(torch.nn, name) for name in (*_RANKS, "SyncBatchNorm")}
    bases["_BatchNorm"] = torch.nn.modules.batchnorm._BatchNorm
    kind = next((name for name in bases if isinstance(module, bases[name])), None)
    if kind is None:
        raise TypeError(
            "Expected a batch normalization of torch.nn, or a state dict. Received: "
            f"{module!r}"
        )
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        raise ValueError("The module is lazy: run it once, so that it has weights.")
    if eps is not None or momentum is not None:
        raise ValueError("`eps` and `momentum` are for state dicts; a module has them.")
    if changed := _changes(module, bases[kind]):
        raise ValueError(
            f"{type(module).__name__} has {changed}, so it may compute something else "
            f"than {kind} does. Convert its state dict, and put what it adds into "
            "another layer."
        )
    return kind


def _changes(module, base):
    """Why a module may compute something else than its base, in words; or None."""
    if getattr(module.forward, "__func__", None) is not base.forward:
        return "a `forward` of its own"
    if type(module).__call__ is not base.__call__:
        return "a `__call__` of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks"
    if hasattr(module, "parametrizations"):
        return "parametrizations"
    return None


def _part(states, prefix):
    """The part of a state dict under a prefix; refuses any but a normalization's."""
    state = {k[len(prefix) :]: v for k, v in states.items() if k.startswith(prefix)}
    if any(key.startswith("parametrizations.") for key in state):
        raise ValueError(
            "The module has parametrizations: remove them with "
            "`torch.nn.utils.parametrize.remove_parametrizations`."
        )
    if all(state.get(name) is not None for name in _STATISTICS.values()):
        return state
    ending = "running_mean"
    prefixes = [key[: -len(ending)] for key in states if str(key).endswith(ending)]
    where = f"under the prefix '{prefix}'" if prefix else "without a prefix"
    if not prefixes:
        raise ValueError(
            f"The state dict has no running statistics {where}, nor anywhere else. "
            f"It has {list(states)[:5]}."
        )
    near = difflib.get_close_matches(prefix, prefixes, n=5) or prefixes[:5]
    others = f", the nearest of {len(prefixes)}" if len(prefixes) > len(near) else ""
    raise ValueError(
        f"The state dict has no running statistics {where}. It has them under "
        f"{near}{others}."
    )


def _shape(rank, axis, channels):
    """The shape to build for: only the size of the channel axis is known."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"`rank` must be an int. Received: rank={rank!r}")
    if isinstance(axis, list | tuple):
        raise ValueError(f"`axis` must be one axis here. Received: axis={axis!r}")
    shape: list[int | None] = [None] * rank
    axis = arguments.check_axis(axis)
    (position,) = arguments.channel_axes(axis, shape, sizes_known=False)
    shape[position] = channels
    return tuple(shape)


def _fixed(module, name):
    """Whether a module has this parameter with `requires_grad=False`."""
    parameter = getattr(module, name, None)
    return parameter is not None and not parameter.requires_grad


def _check_expressible(layer):
    lacking = {
        "axis": isinstance(layer.axis, list),
        "momentum": callable(layer.momentum),
        "renorm": layer.renorm,
        "virtual_batch_size": layer.virtual_batch_size is not None,
        "debias": layer.debias and layer.momentum is not None,
        "freeze_statistics": layer.freeze_statistics,
        "adapt_prior": layer.adapt_prior not in (None, 0),
        "adapt_memory": layer.adapt_memory is not None,
    }
    refused = [
        f"{name}={getattr(layer, name)!r}" for name, yes in lacking.items() if yes
    ]
    if refused:
        raise ValueError(
            f"PyTorch's batch normalization has no equivalent of {', '.join(refused)} "
            f"in '{layer.name}'."
        )


def _array(value):
    """A PyTorch tensor or an array, as an array of at least float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.element_size() < 4 else value
        value = value.numpy()
    return np.asarray(value)


def _other(momentum):
    """Convert between Keras's momentum and PyTorch's, without rounding noise."""
    return round(1.0 - momentum, 12)
