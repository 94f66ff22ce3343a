"""The only entry to the kernels, and the contract of a backend.

`formulas`, `autodiff`, `layout`, `merging` and `plan` are arithmetic in `keras.ops`,
for any backend. The folder of Keras's backend has what is fast there, and says how a
gradient is taken, how a function is compiled and how replicas communicate. Nothing
else in the package names a backend. Everywhere,

- `x` is the input, `(batch, ..., channels)` or with the channels elsewhere;
- `axes` are the channel axes, non-negative and ascending: usually one;
- a statistic or parameter has one value per channel: the shape of `x` along `axes`.

A backend gives:

`forward(x, mask, gamma, beta, *, epsilon, plan) -> (y, Moments)`
    Normalizes a batch with its own statistics. `x` has a float dtype. `mask` is bools
    that broadcast to `x`, true where an element counts, or None. `gamma` and `beta` are
    scale and offset, or None. `epsilon` is added to the variance and is not negative.
    `y` has the shape and dtype of `x`, and its gradients are right, second ones
    included. The `Moments` are float32 at least, and constants to differentiation; of a
    batch that is cut into groups, they have one more leading axis.
`standardize(x, mean, scale, beta)`
    `scale * (x - mean) + beta`, in the order of Keras's layer in inference, and so with
    its rounding. All broadcast.
`make_plan(x, mask, settings) -> Plan`
    The plan for an input, here and now, from its static shape; whether there is a mask;
    and `axes`, `epsilon`, `group_size` and `synchronized` of the settings.
`compiled(function) -> function`
    `function(x, mask, *arguments, settings, plan)` as a function without `plan`, as
    fast as the backend runs it. `x` and `mask` are as above, `arguments` are values per
    channel or named tuples of such; any but `x` may be None. It may be called eagerly
    or inside of what the backend compiles.
`cond(condition, first, second)`
    `first()` where a bool scalar holds, else `second()`: structures alike in shape and
    dtype, in which None may stand for a tensor in both.
`checked(mask, x, along) -> mask`
    The mask, checked when it runs to have the sizes of `x` along some axes, where these
    sizes are unknown until then.
`replicated() -> bool`
    Whether this code runs as one of several replicas in step, whose statistics differ.
`agree(old, new, taken) -> list`
    Averages the replicas' steps (`merging.agree`); only called if `replicated()`.
`blend(old, new, usable, momentum) -> value`
    `old * momentum + new * (1 - momentum)` where the bools `usable` hold, else `old`;
    all of one shape and `old` and `new` of one dtype (`merging.blend`, or what is
    faster).
`add_offset(x, offset, axis) -> y`
    `x + offset`, with one value per channel, which lie along `axis`; as fast as the
    backend does it behind a convolution, forward and backward.
`pruned(x) -> bool`
    Whether what is computed from `x`, and then not used, costs nothing, for `x` belongs
    to a graph that is compiled before it runs.
`retrack(layer)`
    Notes anew which variables a Keras layer has, where the backend keeps a list of them
    that Keras's trackers do not know.
`watched(loops)`
    A context to run a model in for its values, which keeps nothing for gradients; if
    `loops`, a loop over time steps runs step by step, with values in hand.
`modes`
    The ways to run a function, for `verify` and `bench`. `MODES`: their names, of
    "eager", "graph" and "xla"; `USUAL`: the one that `fit` uses; `VERSION`: of the
    backend; `SUMS_IN_ORDER`: whether its fastest op adds up one row after another, and
    so loses digits in long sums.
    `in_mode(function, variables, mode, signature=None)`: a function of tensors, run in
    one of the modes. `variables` are all Keras variables that it reads or assigns.
    `signature` lists `(shape, dtype)` of its arguments, with None for sizes that are
    unknown while it is compiled; by default all are known.
    `with_gradients(function, variables, mode, signature=None)`: a function of `x` and
    an upstream gradient that gives `function(x)` and a list: the gradients of
    `sum(upstream * function(x))` with respect to `x` and to each trainable variable.
    `wait(result)`: the result, when the device has computed it.
    `device()`: where ops run by default, in words.
`Events(folder)`
    An event file for TensorBoard: `write(step, {tag: number})`, `close()`.
"""

import importlib
from collections.abc import Callable
from typing import Any

import keras

from keras_bn.backend import BACKENDS
from keras_bn.backends.layout import broadcast
from keras_bn.backends.plan import Plan
from keras_bn.moments import Moments, Tensor

if keras.backend.backend() not in BACKENDS:
    raise ImportError(
        f"keras_bn runs on Keras's backends {', '.join(BACKENDS)}. Received: "
        f"KERAS_BACKEND={keras.backend.backend()!r}; set it to one of these before "
        "importing keras."
    )

_backend = importlib.import_module(f"keras_bn.backends.{keras.backend.backend()}")

Events = _backend.Events
add_offset = _backend.add_offset
agree = _backend.agree
blend = _backend.blend
checked = _backend.checked
compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = _backend.compiled
cond = _backend.cond
forward: Callable[..., tuple[Tensor, Moments]] = _backend.forward
make_plan = _backend.make_plan
modes = _backend.modes
pruned = _backend.pruned
replicated = _backend.replicated
retrack = _backend.retrack
standardize = _backend.standardize
watched = _backend.watched

__all__ = [
    "Events",
    "Plan",
    "add_offset",
    "agree",
    "blend",
    "broadcast",
    "checked",
    "compiled",
    "cond",
    "forward",
    "make_plan",
    "modes",
    "pruned",
    "replicated",
    "retrack",
    "standardize",
    "watched",
]
