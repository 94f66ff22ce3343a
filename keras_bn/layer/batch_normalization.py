"""The layer: signature, weights, call, config."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import constraints, initializers, ops, regularizers

from keras_bn.backends import backend
from keras_bn.layer import arguments, moving, noted, renorm, step
from keras_bn.layer.arguments import Shape
from keras_bn.layer.frozen import Freezable
from keras_bn.layer.stored import Checked
from keras_bn.moments import Moments, Tensor, at_least_float32, to_tensor

# An initializer, regularizer or constraint: itself, its name or its config.
Named = Callable[..., Tensor] | str | dict[str, Any]


@keras.saving.register_keras_serializable(package="keras_bn")
class BatchNormalization(Freezable, Checked):
    """Drop-in replacement for `keras.layers.BatchNormalization`.

    Same arguments, weights and numbers. In training, each channel is normalized with
    the mean and population variance of the batch,

        y = gamma * (x - mean) / sqrt(variance + epsilon) + beta,

    and the moving statistics take a step toward them,
    `moving = moving * momentum + batch * (1 - momentum)`. In inference, and whenever
    `trainable` is False, the layer normalizes with the moving statistics.

    Keras's layer leaves some cases undefined. Here, the moving statistics do not change
    in a channel whose batch statistics are not finite, nor when the batch is empty or
    fully masked. `training` may be a tensor. A mask works with channels on any axis.
    Weights and statistics are at least float32 under every dtype policy.

    Args:
        axis: int, the channel axis; or a list of ints, for statistics per index over
            several axes. The weights have the sizes of these axes, in input order.
        momentum: float in [0, 1], weight of the old value in the moving statistics;
            None for the plain mean over all batches.
        epsilon: float, 0 or greater, added to the variance.
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
            floats, or `LearningRateSchedule`s of the update count, as from
            `keras_bn.renorm_ramp()`. Missing bounds are inf, 0, inf.
        renorm_momentum: float in [0, 1], momentum of the statistics that training is
            corrected toward.
        synchronized: whether to share the batch statistics of all replicas under a
            `tf.distribute` strategy.
        virtual_batch_size: int, the size of ghost batches. Training cuts a batch of
            `n` in order into `max(1, n // virtual_batch_size)` groups and normalizes
            each by itself; the last takes the remainder. None turns this off.
        unbiased: whether the moving variance uses the unbiased variance of a batch, as
            in PyTorch. The output never uses it.
        debias: whether the moving statistics are the weighted mean of the batches
            seen, without their initial values.
        freeze_statistics: whether training uses the moving statistics and does not
            change them, while gamma and beta still train.
        freeze_affine: whether training does not change gamma and beta; `"gamma"` or
            `"beta"` for one of them. It may be set at any time, like
            `freeze_statistics`, and `trainable = True` does not undo it.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:

    - `inputs`: tensor of rank 2 or more with a known size along `axis`, of any floating
      or integer dtype.
    - `training`: whether to use and record batch statistics: bool, None, or a bool
      tensor.
    - `mask`: tensor, True where an element counts. Its shape is that of `inputs`
      without the last axis, as from `Masking` and `Embedding`, or that of `inputs`
      without its channel axes. Sizes of 1 broadcast.

    Returns:
        A tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        ValueError: for arguments out of range, unknown channel sizes, inputs of rank
            0 or 1, and masks of the wrong shape.
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
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Named = "zeros",
        gamma_initializer: Named = "ones",
        moving_mean_initializer: Named = "zeros",
        moving_variance_initializer: Named = "ones",
        beta_regularizer: Named | None = None,
        gamma_regularizer: Named | None = None,
        beta_constraint: Named | None = None,
        gamma_constraint: Named | None = None,
        renorm: bool = False,
        renorm_clipping: dict[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
        debias: bool = False,
        freeze_statistics: bool = False,
        freeze_affine: bool | str = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.axis = arguments.check_axis(axis)
        self.momentum = None if momentum is None else arguments.check_momentum(momentum)
        self.epsilon = arguments.check_epsilon(epsilon)
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
        self.renorm_clipping = arguments.check_clipping(renorm, renorm_clipping)
        self.renorm_momentum = arguments.check_momentum(
            renorm_momentum, "renorm_momentum"
        )
        self.synchronized = synchronized
        self.virtual_batch_size = arguments.check_group_size(
            virtual_batch_size, synchronized=synchronized, renorm=renorm
        )
        self.unbiased = unbiased
        self.debias = debias
        self.freeze_statistics = freeze_statistics
        self.freeze_affine = freeze_affine
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_mean: Any = None
        self.moving_variance: Any = None
        self.moving_stddev: Any = None
        self.renorm_mean: Any = None
        self.renorm_stddev: Any = None
        self.updates: Any = None

    def build(self, input_shape: Shape) -> None:
        self._axes = arguments.channel_axes(self.axis, input_shape)
        if self.virtual_batch_size is not None and 0 in self._axes:
            raise ValueError(
                "`virtual_batch_size` cuts the batch along axis 0, which must not be a "
                f"channel axis then. Received: axis={self.axis}"
            )
        shape = tuple(input_shape[axis] for axis in self._axes)

        def add(name, initializer, **options):
            # At least float32: in half precision, small steps of a moving statistic
            # or of gamma round to nothing.
            return self.add_weight(
                shape=shape,
                name=name,
                initializer=initializer,
                dtype=at_least_float32(self.variable_dtype),
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
        self._hold_affine()
        # All replicas assign the same value, so no variable needs a reduction.
        state = {"trainable": False, "aggregation": "only_first_replica"}
        self.moving_mean = add("moving_mean", self.moving_mean_initializer, **state)
        self.moving_variance = add(
            "moving_variance", self.moving_variance_initializer, **state
        )
        if self.renorm:
            stddev_initializer = renorm.root_of(self.moving_variance_initializer)
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

    def call(
        self,
        inputs: Tensor,
        training: bool | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if mask is None and ops.is_tensor(training):
            # Keras passes the mask on only if a call has a single tensor argument.
            mask = getattr(inputs, "_keras_mask", None)
        x, mask = self._prepared(inputs, mask)
        if not self.trainable or self.freeze_statistics:
            training = False

        def train():
            settings = self._settings
            y, state = step.train(
                x,
                mask,
                *self._affine,
                self._state,
                self._bounds,
                settings=settings,
                plan=backend.make_plan(x, mask, settings),
            )
            return ops.cast(y, self.compute_dtype), state

        def infer():
            state = self._state
            if (note := noted.of(inputs, self._axes) if self._fused else None) is None:
                settings = step.Settings(self._axes, self.epsilon)
                y = step.infer(x, *self._affine, state, settings=settings)
            else:
                dtype = at_least_float32(x.dtype)
                gamma, beta = self._affine
                scale, offset = step.scale_and_offset(
                    gamma, beta, state, self.epsilon, dtype
                )
                y = noted.follow(note, scale, offset)
            return ops.cast(y, self.compute_dtype), state

        if ops.is_tensor(training):
            y, state = backend.cond(ops.cast(training, "bool"), train, infer)
        else:
            y, state = train() if training else infer()
        if ops.is_tensor(training) or training:
            for variable, new in zip(self._moving, state, strict=True):
                if variable is not None:
                    variable.assign(new)
        return y

    def normalize_batch(
        self, inputs: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Moments]:
        """Normalize a batch by its own statistics, in training and in inference.

        No weight changes, and the options for training have no effect. Recalibration
        and diagnosis use this.

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
        x, mask = self._prepared(inputs, mask)
        settings = step.Settings(self._axes, self.epsilon)
        plan = backend.make_plan(x, mask, settings)
        y, moments = step.normalize(
            x, mask, *self._affine, settings=settings, plan=plan
        )
        return ops.cast(y, self.compute_dtype), moments

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        arguments.channel_axes(self.axis, input_shape, sizes_known=False)
        return input_shape

    def get_config(self) -> dict[str, Any]:
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
            **({"freeze_affine": self.freeze_affine} if self.freeze_affine else {}),
            # Keras's reader of .h5 files drops `axis` if it lists several.
            **({"axes": self.axis} if isinstance(self.axis, list) else {}),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BatchNormalization":
        clipping = keras.saving.deserialize_keras_object(config.get("renorm_clipping"))
        config = {**config, "renorm_clipping": clipping}
        if "axes" in config:
            config["axis"] = config.pop("axes")
        return super().from_config(config)

    def _prepared(self, inputs, mask):
        """The inputs in a float dtype, with known channels, and the mask for them."""
        x = arguments.to_float(to_tensor(inputs), self.compute_dtype)
        x = arguments.with_channels(x, self._axes, self.moving_mean.shape)
        return x, arguments.align_mask(mask, x, self._axes)

    @property
    def _rule(self):
        return moving.Rule(self.momentum, self.debias, self.unbiased)

    @property
    def _scheduled(self):
        """Whether a bound of renormalization follows the update count."""
        bounds = (self.renorm_clipping or {}).values()
        return self.renorm and any(callable(bound) for bound in bounds)

    @property
    def _settings(self):
        return step.Settings(
            self._axes,
            self.epsilon,
            self._rule,
            self.renorm_momentum,
            self.synchronized,
            self.virtual_batch_size,
        )

    @property
    def _moving(self):
        """The variables that training moves."""
        return step.State(
            mean=self.moving_mean,
            variance=self.moving_variance,
            updates=self.updates,
            stddev=self.moving_stddev,
            renorm_mean=self.renorm_mean,
            renorm_stddev=self.renorm_stddev,
        )

    @property
    def _state(self):
        """Their values now."""
        return step.State(*(None if v is None else v.value for v in self._moving))

    @property
    def _affine(self) -> Any:
        return [None if w is None else w.value for w in (self.gamma, self.beta)]

    @property
    def _bounds(self):
        """The present bounds of renormalization; None without it."""
        if not self.renorm:
            return None
        updates = None if self.updates is None else self.updates.value
        return renorm.bounds(self.renorm_clipping, updates, self.moving_mean.dtype)
