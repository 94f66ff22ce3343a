"""Checks of the layer's arguments and inputs."""

import math
import operator
import sys
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_bn.backends import backend
from keras_bn.layer import renorm
from keras_bn.moments import Tensor, at_least_float32

Axis = int | list[int]
# A number, or a function of the update count: a `LearningRateSchedule`.
Momentum = float | Callable[[Any], Any] | None
Shape = Sequence[int | None]

# The parameters that training changes by their gradients.
AFFINE = ("gamma", "beta")


def whole(number: Any) -> int:
    """A whole number of any kind as an int: -1, `numpy.int64(-1)` or -1.0.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(number, bool | np.bool_):
        raise ValueError
    try:
        real = isinstance(number, Real)
        value = int(number) if real else operator.index(number)
    except (TypeError, OverflowError) as error:
        raise ValueError from error
    if real and value != number:
        raise ValueError
    return value


def check_axis(axis: Any) -> Axis:
    """The axis as an int, or as a list of two or more ints."""
    axis = axis.tolist() if isinstance(axis, np.ndarray) else axis
    several = isinstance(axis, list | tuple)
    try:
        axes = [whole(a) for a in (axis if several else [axis])]
    except ValueError:
        raise ValueError(
            f"`axis` must be an int or a list of ints. Received: axis={axis!r}"
        ) from None
    if not axes:
        raise ValueError(f"`axis` must name at least one axis. Received: axis={axis!r}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"`axis` must not repeat an axis. Received: axis={axis!r}")
    return axes if len(axes) > 1 else axes[0]


def number(value: Any, name: str, rule: str, most: float = sys.float_info.max) -> float:
    """A number of any kind as a float, from 0 to the most.

    Args:
        value: what was given.
        name: of the option.
        rule: what it must be.
        most: by default, whatever is finite.

    Raises:
        ValueError: for anything else, naming all three.
    """
    try:
        real = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        real = math.nan
    if not 0.0 <= real <= most:
        raise _refusal(name, rule, value)
    return real


def _refusal(name: str, rule: str, value: Any) -> ValueError:
    return ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}")


def check_share(momentum: Any, name: str) -> float:
    """A momentum as a float between 0 and 1."""
    return number(momentum, name, "between 0 and 1", most=1.0)


def check_momentum(momentum: Any) -> Momentum:
    """The momentum as a float in [0, 1], a schedule, or None for the plain mean."""
    if momentum is None or isinstance(momentum, LearningRateSchedule):
        return momentum
    if callable(momentum):
        rule = "a number, a LearningRateSchedule or None"
        raise _refusal("momentum", rule, momentum)
    return check_share(momentum, "momentum")


def check_flag(value: Any, name: str) -> bool:
    """A bool of any kind: True, `numpy.True_`, 1; None counts as False, as in Keras."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_ | Real) and value in (True, False):
        return bool(value)
    if value is None:
        return False
    raise _refusal(name, "True or False", value)


def check_object(value: Any, name: str) -> Any:
    """An initializer, regularizer or constraint, by itself, its name or config."""
    kind = name.rpartition("_")[2]
    try:
        return getattr(keras, f"{kind}s").get(value)
    except (TypeError, ValueError) as error:
        rule = f"one of `keras.{kind}s`, its name or config, or a callable"
        raise _refusal(name, rule, value) from error


def check_clipping(clipping: dict[str, Any]) -> None:
    """Refuse bounds of renormalization that are unknown or contradict each other."""
    if unknown := set(clipping) - set(renorm.KEYS):
        raise ValueError(
            "Received invalid keys for `renorm_clipping`, which takes "
            f"{list(renorm.KEYS)}. Received: {sorted(unknown, key=str)}"
        )
    rmax, rmin, dmax = (
        None if callable(clipping.get(key)) else clipping.get(key)
        for key in renorm.KEYS
    )
    if rmax is not None and rmin is not None and rmax < rmin:
        raise ValueError(
            "rmax should be greater than or equal to rmin in `renorm_clipping`. "
            f"Received: rmax={rmax}, rmin={rmin}"
        )
    if dmax is not None and dmax < 0:
        raise ValueError(
            f"dmax should be non-negative in `renorm_clipping`. Received: dmax={dmax}"
        )


def check_group_size(size: Any) -> int | None:
    """The size of ghost batches as a positive int, or None."""
    try:
        if size is None or (number := whole(size)) > 0:
            return None if size is None else number
    except ValueError:
        pass
    raise _refusal("virtual_batch_size", "a positive int or None", size)


def check_frozen_affine(value: Any) -> bool | str:
    """`freeze_affine` as a bool, or as the name of one parameter."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str) and value in AFFINE:
        return value
    raise _refusal("freeze_affine", "True, False, 'gamma' or 'beta'", value)


def check_prior(prior: Any) -> float | None:
    """`adapt_prior` as a finite float, 0 or greater; or None."""
    rule = "a finite number of samples, 0 or greater, or None"
    return None if prior is None else number(prior, "adapt_prior", rule)


def check_memory(memory: Any) -> float | None:
    """`adapt_memory` as a float between 0 and 1; or None."""
    return None if memory is None else check_share(memory, "adapt_memory")


def check_bounds(clipping: Any) -> dict[str, Any] | None:
    """Bounds of renormalization, with floats for numbers of any kind."""
    if clipping is None:
        return None
    try:
        bounds = {
            key: bound if bound is None or callable(bound) else float(bound)
            for key, bound in clipping.items()
        }
        if any(isinstance(b, float) and math.isnan(b) for b in bounds.values()):
            raise ValueError
    except (AttributeError, TypeError, ValueError) as error:
        rule = "a dict of numbers, schedules or None, or None"
        raise _refusal("renorm_clipping", rule, clipping) from error
    return bounds


# The arguments of the layer, and what checks each and gives the attribute.
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "axis": check_axis,
    "momentum": check_momentum,
    "epsilon": partial(number, name="epsilon", rule="a finite number, 0 or greater"),
    "renorm_clipping": check_bounds,
    "renorm_momentum": partial(check_share, name="renorm_momentum"),
    "virtual_batch_size": check_group_size,
    "freeze_affine": check_frozen_affine,
    "adapt_prior": check_prior,
    "adapt_memory": check_memory,
}
for _name in (
    *("center", "scale", "renorm", "synchronized"),
    *("unbiased", "debias", "freeze_statistics"),
):
    OPTIONS[_name] = partial(check_flag, name=_name)
for _name in (
    *("beta_initializer", "gamma_initializer"),
    *("moving_mean_initializer", "moving_variance_initializer"),
    *("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint"),
):
    OPTIONS[_name] = partial(check_object, name=_name)
# Those that Keras's layer has not, with the value that means "not used".
BEYOND_KERAS = {
    "virtual_batch_size": None,
    "unbiased": False,
    "debias": False,
    "freeze_statistics": False,
    "freeze_affine": False,
    "adapt_prior": None,
    "adapt_memory": None,
}
# These are in a config only if they are used, so that other versions can read it.
LEFT_OUT = ("freeze_affine", "adapt_prior", "adapt_memory")


def check_together(options: Any) -> None:
    """Refuse options that exclude each other.

    Args:
        options: an object with the `OPTIONS` as attributes: the layer.
    """
    if options.renorm:
        check_clipping(options.renorm_clipping or {})
    if options.debias and callable(options.momentum):
        raise ValueError(
            "`debias` needs a momentum that does not change. Received: debias=True, "
            f"momentum={options.momentum!r}"
        )
    if options.adapt_prior is not None and options.adapt_memory is not None:
        raise ValueError(
            "`adapt_prior` and `adapt_memory` exclude each other. Received: "
            f"adapt_prior={options.adapt_prior}, adapt_memory={options.adapt_memory}"
        )
    if (size := options.virtual_batch_size) is not None:
        for name in ("synchronized", "renorm"):
            if value := getattr(options, name):
                raise ValueError(
                    f"`virtual_batch_size` and `{name}` exclude each other. "
                    f"Received: virtual_batch_size={size}, {name}={value}"
                )


def channel_axes(
    axis: Axis, input_shape: Shape, sizes_known: bool = True
) -> tuple[int, ...]:
    """The channel axes of an input of this shape, non-negative and ascending."""
    rank, shape = len(input_shape), tuple(input_shape)
    if rank < 2:
        raise ValueError(
            "BatchNormalization needs inputs of rank 2 or more, "
            f"(batch, ..., channels). Received: input shape {shape}"
        )
    axes = axis if isinstance(axis, list) else [axis]
    for a in axes:
        if not -rank <= a < rank:
            raise ValueError(
                f"`axis` must be between {-rank} and {rank - 1} for inputs of shape "
                f"{shape}. Received: axis={axis}"
            )
    positive = sorted(a % rank for a in axes)
    if len(set(positive)) < len(axes):
        raise ValueError(
            f"`axis` must not repeat an axis of inputs of shape {shape}. "
            f"Received: axis={axis}"
        )
    if len(axes) == rank:
        raise ValueError(
            f"`axis` must leave an axis to take statistics over in inputs of shape "
            f"{shape}. Received: axis={axis}"
        )
    if sizes_known and any(shape[a] is None for a in positive):
        raise ValueError(
            f"The size of the channel axis must be known. Received: axis={axis}, "
            f"input shape {shape}"
        )
    return tuple(positive)


def to_float(inputs: Tensor, compute_dtype: str) -> Tensor:
    """Floats as they are; integers in the compute dtype, at least float32."""
    dtype = keras.backend.standardize_dtype(inputs.dtype)
    if keras.backend.is_float_dtype(dtype):
        return inputs
    if "int" in dtype or dtype == "bool":
        return ops.cast(inputs, at_least_float32(compute_dtype))
    raise TypeError(f"Inputs must be real numbers. Received: inputs of dtype {dtype}")


def with_channels(x: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The inputs, with unknown channel sizes set to those from `build`.

    Args:
        x: the inputs.
        axes: the channel axes, non-negative and ascending.
        sizes: their sizes.
    """
    if all(x.shape[axis] is not None for axis in axes):
        return x
    shape = list(ops.shape(x))
    for axis, size in zip(axes, sizes, strict=True):
        shape[axis] = size
    return ops.reshape(x, shape)


def align_mask(mask: Tensor, x: Tensor, axes: Sequence[int]) -> Tensor:
    """The mask as bools that broadcast to the inputs; None stays None.

    A mask has the shape of the inputs without the last axis, wherever the channels
    are: `Masking` and `Embedding` give this, and Keras's layer takes it. Otherwise, it
    has the shape of the inputs without the channel axes. Sizes of 1 broadcast.

    Args:
        mask: tensor of any dtype, or None.
        x: the inputs.
        axes: the channel axes, non-negative and ascending.

    Raises:
        ValueError: for a mask of any other shape.
    """
    if mask is None:
        return None
    mask = ops.convert_to_tensor(mask)
    shape, received = tuple(x.shape), tuple(mask.shape)
    leading = tuple(range(len(shape) - 1))
    rows = tuple(axis for axis in range(len(shape)) if axis not in axes)
    fitting = [along for along in (leading, rows) if _fits(received, shape, along)]
    if not fitting:
        expected = [tuple(shape[i] for i in along) for along in (leading, rows)]
        or_else = f", or {expected[1]}, theirs without the channels" * (leading != rows)
        raise ValueError(
            f"The mask must have the shape of the inputs' leading axes, {expected[0]}"
            f"{or_else}, for inputs of shape {shape} with the channels on axis "
            f"{axes[0] if len(axes) == 1 else list(axes)}. "
            f"Received: mask of shape {received}"
        )
    along = fitting[0]
    if leading != rows and None in (*received, *(shape[i] for i in along)):
        mask = backend.assert_mask_shape(mask, x, along)
    missing = [axis for axis in range(len(shape)) if axis not in along]
    return ops.expand_dims(ops.cast(mask, "bool"), missing)


def _fits(received: Shape, shape: Shape, along: Sequence[int]) -> bool:
    """Whether a mask of this shape may lie along these axes of the inputs."""
    return len(received) == len(along) and all(
        size in (None, 1, shape[axis]) or shape[axis] is None
        for size, axis in zip(received, along, strict=True)
    )
