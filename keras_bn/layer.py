"""The layer: arguments, weights, call, config."""

import math
import operator
from typing import Any

import keras
from keras import constraints, initializers, ops, regularizers

from keras_bn import kernels, moving


@kernels.compiled
def _train(
    x, mask, gamma, beta, mean, variance, *, axes, epsilon, momentum, synchronized
):
    """One training step: the output and the new moving mean and variance."""
    y, batch = kernels.normalize_batch(
        x, mask, gamma, beta, axes=axes, epsilon=epsilon, synchronized=synchronized
    )
    return y, *moving.exponential(mean, variance, batch, momentum)


@kernels.compiled
def _infer(x, mask, gamma, beta, mean, variance, *, axes, epsilon):
    """The output under the moving statistics; the mask has no part in it."""
    return kernels.normalize_with(
        x, mean, variance, gamma, beta, axes=axes, epsilon=epsilon
    )


@keras.saving.register_keras_serializable(package="keras_bn")
class BatchNormalization(keras.layers.Layer):
    r"""Batch normalization, in the place of `keras.layers.BatchNormalization`.

    Same arguments, weights and numbers. In training, each channel is normalized with
    the mean and population variance of the batch,

    $$y = \gamma\,\frac{x - \bar x}{\sqrt{s^2 + \epsilon}} + \beta,$$

    and the moving statistics take a step toward them,
    `moving = moving * momentum + batch * (1 - momentum)`. In inference, and whenever
    `trainable` is False, the moving statistics stand in for those of the batch.

    What Keras's layer leaves undefined is defined here: a channel whose batch
    statistics are not finite, and a batch in which nothing counts (empty, or masked
    whole), leave the moving statistics as they are; `training` may be a tensor; a
    mask may go with channels on any axis; weights and statistics are float32 at least
    under every dtype policy.

    Args:
        axis: int, the channel axis; or a list of ints, for statistics per index over
            several axes, with weights of those axes' sizes in the input's order.
        momentum: float in [0, 1], weight of the old value in the moving statistics.
        epsilon: float, not negative, added to the variance.
        center: whether to add `beta`.
        scale: whether to multiply by `gamma`.
        beta_initializer, gamma_initializer: initializers of the parameters.
        moving_mean_initializer, moving_variance_initializer: initializers of the
            moving statistics.
        beta_regularizer, gamma_regularizer: optional regularizers.
        beta_constraint, gamma_constraint: optional constraints.
        renorm, renorm_clipping, renorm_momentum: batch renormalization. Not
            implemented yet; `renorm=True` is refused.
        synchronized: whether to share the batch statistics of all replicas under a
            `tf.distribute` strategy.
        virtual_batch_size, unbiased, debias, freeze_statistics: options beyond
            Keras's. Not implemented yet; refused unless left at their defaults.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: tensor of rank 2 or more with a known size along `axis`, of any
            floating or integer dtype.
        training: whether to use and record batch statistics: bool, None, or a bool
            tensor.
        mask: tensor of the shape of `inputs` without its channel axes (sizes of 1
            broadcast), true where an element counts.

    Returns:
        A tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        ValueError: for arguments out of range, unknown channel sizes, inputs of rank
            0 or 1, and masks of the wrong shape; each names what was received.
        TypeError: for inputs that are not real numbers.
        NotImplementedError: for the options named above.

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network
    Training by Reducing Internal Covariate Shift", 2015.

    Example:

    >>> import numpy as np
    >>> import keras_bn
    >>> layer = keras_bn.BatchNormalization()
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], "float32")
    >>> print(np.round(layer(x, training=True).numpy(), 2))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(np.round(layer.moving_mean.numpy(), 2))
    [0.02 0.2 ]
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        beta_initializer="zeros",
        gamma_initializer="ones",
        moving_mean_initializer="zeros",
        moving_variance_initializer="ones",
        beta_regularizer=None,
        gamma_regularizer=None,
        beta_constraint=None,
        gamma_constraint=None,
        renorm=False,
        renorm_clipping=None,
        renorm_momentum=0.99,
        synchronized=False,
        *,
        virtual_batch_size=None,
        unbiased=False,
        debias=False,
        freeze_statistics=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _refuse_unfinished(
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            virtual_batch_size=virtual_batch_size,
            unbiased=unbiased,
            debias=debias,
            freeze_statistics=freeze_statistics,
        )
        self.axis = _check_axis(axis)
        self.momentum = _check_momentum(momentum)
        self.epsilon = _check_epsilon(epsilon)
        self.center = center
        self.scale = scale
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.renorm = renorm
        self.renorm_clipping = renorm_clipping
        self.renorm_momentum = renorm_momentum
        self.synchronized = synchronized
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased
        self.debias = debias
        self.freeze_statistics = freeze_statistics
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_mean: Any = None
        self.moving_variance: Any = None

    def build(self, input_shape):
        self._axes = _channel_axes(self.axis, input_shape)
        shape = tuple(input_shape[axis] for axis in self._axes)

        def add(name, initializer, **options):
            # At least float32 under any policy: a half type can't hold a moving
            # statistic (its steps round away) nor a small update of gamma.
            dtype = keras.backend.result_type(self.variable_dtype, "float32")
            return self.add_weight(
                shape=shape,
                name=name,
                initializer=initializer,
                dtype=dtype,
                autocast=False,
                **options,
            )

        if self.scale:
            self.gamma = add(
                "gamma",
                self.gamma_initializer,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
            )
        if self.center:
            self.beta = add(
                "beta",
                self.beta_initializer,
                regularizer=self.beta_regularizer,
                constraint=self.beta_constraint,
            )
        # Replicas that see different batches agree on the mean of their statistics.
        statistic = {"trainable": False, "aggregation": "mean"}
        self.moving_mean = add("moving_mean", self.moving_mean_initializer, **statistic)
        self.moving_variance = add(
            "moving_variance", self.moving_variance_initializer, **statistic
        )
        axes = self.axis if isinstance(self.axis, list) else [self.axis]
        self.input_spec = keras.InputSpec(
            ndim=len(input_shape), axes={axis: input_shape[axis] for axis in axes}
        )
        self.built = True

    def call(self, inputs, training=None, mask=None):
        if mask is None and ops.is_tensor(training):
            # Keras hands on the mask of the only tensor argument; here are two.
            mask = getattr(inputs, "_keras_mask", None)
        x = _to_float(inputs, self.compute_dtype)
        mask = _check_mask(mask, x, self._axes)
        mean, variance = self.moving_mean.value, self.moving_variance.value
        gamma = None if self.gamma is None else self.gamma.value
        beta = None if self.beta is None else self.beta.value
        tensors = (x, mask, gamma, beta, mean, variance)
        options = {"axes": self._axes, "epsilon": self.epsilon}

        def train():
            return _train(
                *tensors,
                **options,
                momentum=self.momentum,
                synchronized=self.synchronized,
            )

        def infer():
            return _infer(*tensors, **options), mean, variance

        if not self.trainable:
            training = False
        if ops.is_tensor(training):
            y, mean, variance = ops.cond(ops.cast(training, "bool"), train, infer)
        else:
            y, mean, variance = train() if training else infer()
        if ops.is_tensor(training) or training:
            self.moving_mean.assign(mean)
            self.moving_variance.assign(variance)
        return ops.cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        _channel_axes(self.axis, input_shape, sizes_known=False)
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "beta_initializer": initializers.serialize(self.beta_initializer),
            "gamma_initializer": initializers.serialize(self.gamma_initializer),
            "moving_mean_initializer": initializers.serialize(
                self.moving_mean_initializer
            ),
            "moving_variance_initializer": initializers.serialize(
                self.moving_variance_initializer
            ),
            "beta_regularizer": regularizers.serialize(self.beta_regularizer),
            "gamma_regularizer": regularizers.serialize(self.gamma_regularizer),
            "beta_constraint": constraints.serialize(self.beta_constraint),
            "gamma_constraint": constraints.serialize(self.gamma_constraint),
            "renorm": self.renorm,
            "renorm_clipping": self.renorm_clipping,
            "renorm_momentum": self.renorm_momentum,
            "synchronized": self.synchronized,
            "virtual_batch_size": self.virtual_batch_size,
            "unbiased": self.unbiased,
            "debias": self.debias,
            "freeze_statistics": self.freeze_statistics,
        }


def _refuse_unfinished(**options):
    for name, value in options.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                f"`{name}` is not implemented yet in keras_bn.BatchNormalization. "
                f"Received: {name}={value!r}"
            )


def _check_axis(axis):
    """The axis as an int, or as a list of two or more ints."""
    several = isinstance(axis, list | tuple)
    try:
        if isinstance(axis, bool):
            raise TypeError
        axes = [operator.index(a) for a in (axis if several else [axis])]
    except TypeError:
        raise ValueError(
            f"`axis` must be an int or a list of ints. Received: axis={axis!r}"
        ) from None
    if not axes:
        raise ValueError(f"`axis` must name at least one axis. Received: axis={axis!r}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"`axis` must not repeat an axis. Received: axis={axis!r}")
    return axes if len(axes) > 1 else axes[0]


def _check_momentum(momentum):
    if momentum is None:
        raise NotImplementedError(
            "`momentum=None` is not implemented yet in keras_bn.BatchNormalization."
        )
    if not 0.0 <= (number := float(momentum)) <= 1.0:
        raise ValueError(
            f"`momentum` must be between 0 and 1. Received: momentum={momentum!r}"
        )
    return number


def _check_epsilon(epsilon):
    if not 0.0 <= (number := float(epsilon)) < math.inf:
        raise ValueError(
            "`epsilon` must be a finite number, 0 or greater. "
            f"Received: epsilon={epsilon!r}"
        )
    return number


def _channel_axes(axis, input_shape, sizes_known=True):
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


def _to_float(inputs, compute_dtype):
    """The inputs in a float dtype; integers in the compute dtype, float32 at least."""
    dtype = keras.backend.standardize_dtype(inputs.dtype)
    if keras.backend.is_float_dtype(dtype):
        return inputs
    if "int" in dtype or dtype == "bool":
        return ops.cast(inputs, keras.backend.result_type(compute_dtype, "float32"))
    raise TypeError(f"Inputs must be real numbers. Received: inputs of dtype {dtype}")


def _check_mask(mask, x, axes):
    """The mask as a bool tensor, once its shape is known to fit; None stays None."""
    if mask is None:
        return None
    mask = ops.convert_to_tensor(mask)
    shape = tuple(x.shape)
    expected = tuple(size for i, size in enumerate(shape) if i not in axes)
    received = tuple(mask.shape)
    fits = len(received) == len(expected) and all(
        got in (None, 1, size) or size is None
        for got, size in zip(received, expected, strict=True)
    )
    if not fits:
        raise ValueError(
            "The mask must have the shape of the inputs without the channel axis: "
            f"{expected} for inputs of shape {shape} with the channels on axis "
            f"{axes[0] if len(axes) == 1 else list(axes)}. "
            f"Received: mask of shape {received}"
        )
    return ops.cast(mask, "bool")
