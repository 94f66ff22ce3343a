"""The layer: arguments, weights, call, config."""

import math
import operator
from typing import Any

import keras
import numpy as np
from keras import constraints, initializers, ops, regularizers

from keras_bn import kernels, moving, renorm


@kernels.compiled
def _train(
    x,
    mask,
    gamma,
    beta,
    mean,
    variance,
    updates,
    *renorm_state,
    axes,
    epsilon,
    synchronized,
    virtual_batch_size,
    rule,
    renorm_momentum,
):
    """One training step: the output and the new state, in the order it was given."""
    if renorm_state:
        # The correction is one more step on the output: not in a half type.
        x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
    y, batch = kernels.normalize_batch(
        x,
        mask,
        gamma,
        beta,
        axes=axes,
        epsilon=epsilon,
        synchronized=synchronized,
        group_size=virtual_batch_size,
    )
    old, new_renorm = moving.Statistics(mean, variance, updates), []
    if renorm_state:
        old_renorm = renorm.Statistics(*renorm_state[:3])
        limits = renorm.Bounds(*renorm_state[3:])
        r, d = renorm.correction(old_renorm, batch, limits, epsilon)
        # gamma (x̂ r + d) + beta, from y = gamma x̂ + beta: at r = 1 and d = 0 it is y
        # itself, to the bit.
        offset = d if gamma is None else gamma * d
        if beta is not None:
            offset += beta * (1.0 - r)
        y = kernels.affine(y, r, offset, axes=axes)
        new, new_renorm = renorm.update(
            old, old_renorm, batch, rule, renorm_momentum, epsilon
        )
    else:
        new = moving.update(old, batch, rule)
    state = [*new, *new_renorm]
    if kernels.replicated() and not synchronized:
        state = _agreed([*old, *renorm_state[:3]], state, batch, rule)
    return y, *_present(state)


def _agreed(old, new, batch, rule):
    """The new state on which replicas agree that took different steps from the old."""
    mean, variance = moving.usable_parts(batch, rule)
    if len(mean.shape) > len(old[0].shape):
        mean, variance = ops.any(mean, axis=0), ops.any(variance, axis=0)
    both = ops.stack([mean, variance])
    taken = (mean, variance, both, variance, mean, mean)[: len(new)]
    kept = [v for v in zip(old, new, taken, strict=True) if v[0] is not None]
    return kernels.agree(*zip(*kept, strict=True))


@kernels.compiled
def _normalize(x, mask, gamma, beta, *, axes, epsilon):
    """The output under the batch's own statistics, and these."""
    return kernels.normalize_batch(x, mask, gamma, beta, axes=axes, epsilon=epsilon)


@kernels.compiled
def _infer(x, mask, gamma, beta, mean, variance, *, axes, epsilon):
    """The output under the moving statistics; the mask has no part in it."""
    return kernels.normalize_with(
        x, mean, variance, gamma, beta, axes=axes, epsilon=epsilon
    )


def _present(values):
    return [value for value in values if value is not None]


@keras.saving.register_keras_serializable(package="keras_bn")
class BatchNormalization(keras.layers.Layer):
    """Batch normalization, in the place of `keras.layers.BatchNormalization`.

    Same arguments, weights and numbers. In training, each channel is normalized with
    the mean and population variance of the batch,

        y = gamma * (x - mean) / sqrt(variance + epsilon) + beta,

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
        momentum: float in [0, 1], weight of the old value in the moving statistics;
            None for the plain mean over all batches.
        epsilon: float, not negative, added to the variance.
        center: whether to add `beta`.
        scale: whether to multiply by `gamma`.
        beta_initializer, gamma_initializer: initializers of the parameters.
        moving_mean_initializer, moving_variance_initializer: initializers of the
            moving statistics.
        beta_regularizer, gamma_regularizer: optional regularizers.
        beta_constraint, gamma_constraint: optional constraints.
        renorm: whether to use batch renormalization (Ioffe, 2017), with Keras's
            weights and numbers.
        renorm_clipping: dict with any of the keys `"rmax"`, `"rmin"`, `"dmax"`:
            floats, or `LearningRateSchedule`s of the update count such as
            `keras_bn.renorm_ramp()` gives. Missing bounds are inf, 0, inf.
        renorm_momentum: float in [0, 1], momentum of the statistics that training is
            corrected toward.
        synchronized: whether to share the batch statistics of all replicas under a
            `tf.distribute` strategy.
        virtual_batch_size: int, the size of ghost batches: in training, a batch of
            `n` is cut in order into `max(1, n // virtual_batch_size)` groups, the
            last taking the remainder, each normalized by itself. None for none.
        unbiased: whether the moving variance takes in the unbiased variance of a
            batch, as PyTorch's does. The output never uses it.
        debias: whether the moving statistics are the weighted mean of the batches
            seen alone, without the pull of their initial values.
        freeze_statistics: whether training uses the moving statistics and leaves
            them alone, while gamma and beta still train. May be set on a live layer.
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

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network
    Training by Reducing Internal Covariate Shift", 2015. Ghost batches: Hoffer, Hubara
    and Soudry, "Train longer, generalize better", 2017.

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
        self.axis = _check_axis(axis)
        self.momentum = None if momentum is None else _check_momentum(momentum)
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
        self.renorm_clipping = _check_clipping(renorm, renorm_clipping)
        self.renorm_momentum = _check_momentum(renorm_momentum, "renorm_momentum")
        self.synchronized = synchronized
        self.virtual_batch_size = _check_group_size(
            virtual_batch_size, synchronized=synchronized, renorm=renorm
        )
        self.unbiased = unbiased
        self.debias = debias
        self.freeze_statistics = freeze_statistics
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_mean: Any = None
        self.moving_variance: Any = None
        self.moving_stddev: Any = None
        self.renorm_mean: Any = None
        self.renorm_stddev: Any = None
        self.updates: Any = None

    def build(self, input_shape):
        self._axes = _channel_axes(self.axis, input_shape)
        if self.virtual_batch_size is not None and 0 in self._axes:
            raise ValueError(
                "`virtual_batch_size` cuts the batch along axis 0, which must not be a "
                f"channel axis then. Received: axis={self.axis}"
            )
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
        # What replicas assign is equal already: no reduction of each variable's own.
        state = {"trainable": False, "aggregation": "only_first_replica"}
        self.moving_mean = add("moving_mean", self.moving_mean_initializer, **state)
        self.moving_variance = add(
            "moving_variance", self.moving_variance_initializer, **state
        )
        if self.renorm:
            stddev_initializer = _root_of(self.moving_variance_initializer)
            self.moving_stddev = add("moving_stddev", stddev_initializer, **state)
            self.renorm_mean = add("renorm_mean", self.moving_mean_initializer, **state)
            self.renorm_stddev = add("renorm_stddev", stddev_initializer, **state)
        if self._rule.counts or self._scheduled:
            self.updates = self.add_weight(
                shape=(2, *shape),
                name="updates",
                initializer="zeros",
                dtype="int64",
                autocast=False,
                **state,
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
        if not self.trainable or self.freeze_statistics:
            training = False

        def train():
            y, *state = self._train(x, mask)
            return [ops.cast(y, self.compute_dtype), *state]

        def infer():
            state = [ops.convert_to_tensor(variable) for variable in self._state]
            return [ops.cast(self._infer(x), self.compute_dtype), *state]

        if ops.is_tensor(training):
            y, *state = kernels.choose(ops.cast(training, "bool"), train, infer)
        else:
            y, *state = train() if training else infer()
        if ops.is_tensor(training) or training:
            for variable, new in zip(self._state, state, strict=True):
                variable.assign(new)
        return y

    def normalize_batch(self, inputs, mask=None):
        """Normalize a batch by its own statistics, whatever the layer would do.

        Nothing moves, and no option of the training has a part in it. What looks at
        statistics from outside (recalibration, diagnosis) builds on this.

        Args:
            inputs, mask: as in a call of the layer.

        Returns:
            `(outputs, Moments)`: the outputs, and the moments of the batch.

        >>> import numpy as np
        >>> import keras_bn
        >>> layer = keras_bn.BatchNormalization()
        >>> layer.build((None, 1))
        >>> y, moments = layer.normalize_batch(np.array([[1.0], [3.0]], "float32"))
        >>> print(np.round(y.numpy().T, 2), moments.mean.numpy())
        [[-1.  1.]] [2.]
        """
        x = _to_float(inputs, self.compute_dtype)
        mask = _check_mask(mask, x, self._axes)
        y, moments = _normalize(
            x, mask, *self._affine, axes=self._axes, epsilon=self.epsilon
        )
        return ops.cast(y, self.compute_dtype), moments

    def compute_output_shape(self, input_shape):
        _channel_axes(self.axis, input_shape, sizes_known=False)
        return input_shape

    def load_own_variables(self, store):
        self._check_stored(store)
        super().load_own_variables(store)

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
            "renorm_clipping": keras.saving.serialize_keras_object(
                self.renorm_clipping
            ),
            "renorm_momentum": self.renorm_momentum,
            "synchronized": self.synchronized,
            "virtual_batch_size": self.virtual_batch_size,
            "unbiased": self.unbiased,
            "debias": self.debias,
            "freeze_statistics": self.freeze_statistics,
            # Keras's reader of .h5 files throws away an `axis` of several.
            **({"axes": self.axis} if isinstance(self.axis, list) else {}),
        }

    @classmethod
    def from_config(cls, config):
        clipping = keras.saving.deserialize_keras_object(config.get("renorm_clipping"))
        config = {**config, "renorm_clipping": clipping}
        if "axes" in config:
            config["axis"] = config.pop("axes")
        return super().from_config(config)

    @property
    def _rule(self):
        return moving.Rule(self.momentum, self.debias, self.unbiased)

    @property
    def _scheduled(self):
        """Whether a bound of renormalization follows the update count."""
        bounds = (self.renorm_clipping or {}).values()
        return self.renorm and any(callable(bound) for bound in bounds)

    @property
    def _state(self):
        """The variables that training moves, in the order that `_train` gives them."""
        return _present(
            [
                self.moving_mean,
                self.moving_variance,
                self.updates,
                self.moving_stddev,
                self.renorm_mean,
                self.renorm_stddev,
            ]
        )

    @property
    def _affine(self):
        return [None if w is None else w.value for w in (self.gamma, self.beta)]

    def _train(self, x, mask):
        moving_state = [self.moving_mean.value, self.moving_variance.value]
        updates = None if self.updates is None else self.updates.value
        renorm_state = []
        if self.renorm:
            variables = (self.moving_stddev, self.renorm_mean, self.renorm_stddev)
            renorm_state += [variable.value for variable in variables]
            renorm_state += renorm.bounds(
                self.renorm_clipping, updates, self.moving_mean.dtype
            )
        return _train(
            x,
            mask,
            *self._affine,
            *moving_state,
            updates,
            *renorm_state,
            axes=self._axes,
            epsilon=self.epsilon,
            synchronized=self.synchronized,
            virtual_batch_size=self.virtual_batch_size,
            rule=self._rule,
            renorm_momentum=self.renorm_momentum,
        )

    def _infer(self, x):
        statistics = self.moving_mean.value, self.moving_variance.value
        return _infer(
            x, None, *self._affine, *statistics, axes=self._axes, epsilon=self.epsilon
        )

    def _check_stored(self, store):
        """Refuse a stored moving variance that no training can have left behind."""
        names = [variable.name for variable in self.variables]
        key = str(names.index("moving_variance"))
        if key not in store.keys():  # noqa: SIM118 (a store is not a dict)
            return
        variance = np.asarray(store[key])
        bad = np.argwhere(~(np.isfinite(variance) & (variance >= 0)))
        if len(bad):
            channel = tuple(int(i) for i in bad[0])
            raise ValueError(
                f"Layer {self.name!r} can't load a moving variance that is negative or "
                f"not finite. Received: {variance[channel]} in channel "
                f"{channel[0] if len(channel) == 1 else channel}"
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


def _check_momentum(momentum, name="momentum"):
    if not 0.0 <= (number := float(momentum)) <= 1.0:
        raise ValueError(
            f"`{name}` must be between 0 and 1. Received: {name}={momentum!r}"
        )
    return number


def _check_clipping(renorm_used, clipping):
    if not renorm_used:
        return clipping
    clipping = dict(clipping or {})
    if unknown := set(clipping) - set(renorm.KEYS):
        raise ValueError(
            f"`renorm_clipping` takes the keys {list(renorm.KEYS)}. "
            f"Received: {sorted(unknown)}"
        )
    rmax, rmin, dmax = (
        None if callable(clipping.get(key)) else clipping.get(key)
        for key in renorm.KEYS
    )
    if rmax is not None and rmin is not None and rmax < rmin:
        raise ValueError(
            "`rmax` in `renorm_clipping` must not be less than `rmin`. "
            f"Received: rmax={rmax}, rmin={rmin}"
        )
    if dmax is not None and dmax < 0:
        raise ValueError(
            f"`dmax` in `renorm_clipping` must be 0 or greater. Received: dmax={dmax}"
        )
    return clipping


def _check_group_size(size, **excluded):
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            "`virtual_batch_size` must be a positive int or None. "
            f"Received: virtual_batch_size={size!r}"
        )
    for name, value in excluded.items():
        if value:
            raise ValueError(
                f"`virtual_batch_size` and `{name}` exclude each other. "
                f"Received: virtual_batch_size={size}, {name}={value}"
            )
    return size


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


def _root_of(initializer):
    """An initializer that draws the square root of what `initializer` draws."""

    def draw(shape, dtype=None):
        return ops.sqrt(initializer(shape, dtype=dtype))

    return draw


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
