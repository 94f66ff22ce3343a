"""The layer: signature, weights, call, config."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_bn.backends import backend
from keras_bn.layer import arguments, fusion, moving, renorm, step, traces
from keras_bn.layer.arguments import Shape
from keras_bn.layer.stored import StoredOptions, ValidStatistics
from keras_bn.moments import Moments, Tensor, at_least_float32, to_tensor

# An initializer, regularizer or constraint: itself, its name or its config.
Named = Callable[..., Tensor] | str | dict[str, Any]


@keras.saving.register_keras_serializable(package="keras_bn")
class BatchNormalization(StoredOptions, ValidStatistics):
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
        momentum: float in [0, 1], weight of the old value in the moving statistics; a
            `LearningRateSchedule` of the update count that gives it; or None for the
            plain mean over all batches.
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
            `"beta"` for one of them. `trainable = True` does not undo it.
        adapt_prior: float, 0 or greater: inference normalizes with the moving
            statistics, counted as so many samples, pooled with those of the present
            batch; 0 is the batch alone. None turns this off. See `keras_bn.adapt`.
        adapt_memory: float in [0, 1]: inference normalizes with a running average over
            the batches that it has seen, in which the old value has this weight. It
            starts from the initial moving statistics; `keras_bn.adapt` starts it from
            the present ones. None turns this off.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Each argument is an attribute that may be set at any time. It takes effect in the
    next step of every model that holds the layer, also during `fit`; a `tf.function` of
    your own you have to trace again. A built layer refuses what would need other
    weights than it has.

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

    # Whether the constructor is through: from then on an option is checked when set.
    _complete = False
    # Whether to be computed as one with linear layers before it, or beside it.
    fused = False

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: arguments.Momentum = 0.99,
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
        adapt_prior: float | None = None,
        adapt_memory: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.axis = arguments.check_axis(axis)
        self.momentum = momentum
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        self.beta_initializer = beta_initializer
        self.gamma_initializer = gamma_initializer
        self.moving_mean_initializer = moving_mean_initializer
        self.moving_variance_initializer = moving_variance_initializer
        self.beta_regularizer = beta_regularizer
        self.gamma_regularizer = gamma_regularizer
        self.beta_constraint = beta_constraint
        self.gamma_constraint = gamma_constraint
        self.renorm = renorm
        self.renorm_clipping = (renorm_clipping or {}) if renorm else renorm_clipping
        self.renorm_momentum = renorm_momentum
        self.synchronized = synchronized
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased
        self.debias = debias
        self.freeze_statistics = freeze_statistics
        self.freeze_affine = freeze_affine
        self.adapt_prior = adapt_prior
        self.adapt_memory = adapt_memory
        arguments.check_together(self)
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_mean: Any = None
        self.moving_variance: Any = None
        self.moving_stddev: Any = None
        self.renorm_mean: Any = None
        self.renorm_stddev: Any = None
        self.updates: Any = None
        self.adapted_mean: Any = None
        self.adapted_variance: Any = None
        self._complete = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; an option at any time, or refuse it in words.

        Raises:
            ValueError: for an option that is out of range, that another one excludes,
                or for which a built layer has not the weights. Nothing changes then.
        """
        if name not in arguments.OPTIONS:
            super().__setattr__(name, value)
            return
        before = getattr(self, name, None)
        super().__setattr__(name, arguments.OPTIONS[name](value))
        if not self._complete:
            return
        try:
            arguments.check_together(self)
            if self.built:
                self._check_weights(name)
        except ValueError:
            super().__setattr__(name, before)
            raise
        self.set_later = (*(n for n in self.set_later if n != name), name)
        if self.built and (self._apply_option(name) or getattr(self, name) != before):
            traces.forget([self])

    @property
    def trainable(self) -> bool:
        """Whether the layer trains; if not, it uses the moving statistics always."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        self._freeze_parameters()

    def set_fused(self, fused: bool) -> None:
        """Whether to be computed as one with linear layers before it, or beside it.

        It ends when the statistics are no longer frozen. See `keras_bn.freeze`.
        """
        if fused != self.fused:
            self.fused = fused
            traces.forget([self])

    def build(self, input_shape: Shape) -> None:
        self._axes = self._channel_axes(input_shape)
        shape = tuple(input_shape[axis] for axis in self._axes)
        for name, (needed, options) in self._weight_options(shape).items():
            if needed:
                weight = self.add_weight(name=name, autocast=False, **options)
                setattr(self, name, weight)
        self._freeze_parameters()
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
            mask = _mask_of(inputs)
        x, mask, restored = self._prepare(inputs, mask)
        if backend.prunes(x):
            traces.remember(self)
        # Training with frozen statistics uses the moving ones and nothing else.
        adapts = self.adapts and (ops.is_tensor(training) or not training)
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
                self._momentum,
                settings=settings,
                plan=backend.make_plan(x, mask, settings),
            )
            return ops.cast(y, self.compute_dtype), state, self._adapted

        def adapt():
            settings = step.Settings(self._axes, self.epsilon)
            y, adapted = step.adapt(
                x,
                mask,
                *self._affine,
                self._adapted or step.State(*self._state[:2]),
                prior=self.adapt_prior,
                memory=self.adapt_memory,
                settings=settings,
                plan=backend.make_plan(x, mask, settings),
            )
            adapted = None if self.adapt_memory is None else adapted
            return ops.cast(y, self.compute_dtype), self._state, adapted

        def infer():
            state, (gamma, beta) = self._state, self._affine
            if self.fused and backend.prunes(x):
                dtype = at_least_float32(x.dtype)
                both = step.scale_and_offset(gamma, beta, state, self.epsilon, dtype)
                own = fusion.itself(inputs, x, self._axes, self)
                y = fusion.normalize(inputs, own, *both)
            else:
                settings = step.Settings(self._axes, self.epsilon)
                y = step.infer(x, gamma, beta, state, settings=settings)
            return ops.cast(y, self.compute_dtype), state, self._adapted

        without = adapt if adapts else infer
        if ops.is_tensor(training):
            condition = ops.cast(training, "bool")
            y, state, adapted = backend.cond(condition, train, without)
        else:
            y, state, adapted = train() if training else without()
        if ops.is_tensor(training) or training:
            for variable, new in zip(self._moving, state, strict=True):
                if variable is not None:
                    variable.assign(new)
        if adapts and adapted is not None:
            self.adapted_mean.assign(adapted.mean)
            self.adapted_variance.assign(adapted.variance)
        return restored(y)

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
        x, mask, restored = self._prepare(inputs, mask)
        settings = step.Settings(self._axes, self.epsilon)
        plan = backend.make_plan(x, mask, settings)
        y, moments = step.normalize(
            x, mask, *self._affine, settings=settings, plan=plan
        )
        return restored(ops.cast(y, self.compute_dtype)), moments

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        arguments.channel_axes(self.axis, input_shape, sizes_known=False)
        return input_shape

    def __repr__(self) -> str:
        # Keras names the class alone, which is that of its own layer.
        words = super().__repr__()
        known = type(self) is BatchNormalization
        return words.replace("<", "<keras_bn.", 1) if known else words

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        config = {name: serialize(getattr(self, name)) for name in arguments.OPTIONS}
        for name in arguments.LEFT_OUT:
            if getattr(self, name) == arguments.BEYOND_KERAS[name]:
                del config[name]
        if isinstance(self.axis, list):
            # Keras's reader of .h5 files drops `axis` if it lists several.
            config["axes"] = config["axis"]
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BatchNormalization":
        for name in ("momentum", "renorm_clipping"):
            if name in config:
                value = keras.saving.deserialize_keras_object(config[name])
                config = {**config, name: value}
        if "axes" in config:
            config["axis"] = config.pop("axes")
        return super().from_config(config)

    def _prepare(self, inputs, mask):
        """The inputs in a float dtype, with known channels, and the mask for them.

        And the function that gives the output the form of the inputs.
        """
        tensor = to_tensor(inputs)
        x, mask, restored = backend.dense(tensor, mask, self._axes)
        if x is not tensor and self.virtual_batch_size is not None:
            raise ValueError(
                "`virtual_batch_size` cannot cut a ragged tensor into groups. "
                f"Received: virtual_batch_size={self.virtual_batch_size}, of shape "
                f"{tuple(tensor.shape)} with ragged axes"
            )
        x = arguments.to_float(x, self.compute_dtype)
        x = arguments.with_channels(x, self._axes, self.moving_mean.shape)
        return x, arguments.align_mask(mask, x, self._axes), restored

    def _channel_axes(self, input_shape, sizes_known=True):
        axes = arguments.channel_axes(self.axis, input_shape, sizes_known)
        if self.virtual_batch_size is not None and 0 in axes:
            raise ValueError(
                "`virtual_batch_size` cuts the batch along axis 0, which must not be a "
                f"channel axis then. Received: axis={self.axis}"
            )
        return axes

    def _weight_options(self, shape):
        """For each weight, whether the options need it, and how to add it."""
        # At least float32: in half precision, small steps of a moving statistic or of
        # gamma round to nothing.
        affine = {"shape": shape, "dtype": at_least_float32(self.variable_dtype)}
        # All replicas assign the same value, so no variable needs a reduction.
        state = {"trainable": False, "aggregation": "only_first_replica"}
        gamma = {
            **affine,
            "initializer": self.gamma_initializer,
            "regularizer": self.gamma_regularizer,
            "constraint": self.gamma_constraint,
        }
        beta = {
            **affine,
            "initializer": self.beta_initializer,
            "regularizer": self.beta_regularizer,
            "constraint": self.beta_constraint,
        }
        mean = {**affine, **state, "initializer": self.moving_mean_initializer}
        variance = {**mean, "initializer": self.moving_variance_initializer}
        stddev = {**mean, "initializer": renorm.root_of(variance["initializer"])}
        counts = {"shape": (2, *shape), "dtype": "int64", "initializer": "zeros"}
        return {
            "gamma": (self.scale, gamma),
            "beta": (self.center, beta),
            "moving_mean": (True, mean),
            "moving_variance": (True, variance),
            "moving_stddev": (self.renorm, stddev),
            "renorm_mean": (self.renorm, mean),
            "renorm_stddev": (self.renorm, stddev),
            "updates": (self._rule.counts or self._scheduled, {**state, **counts}),
            "adapted_mean": (self.adapt_memory is not None, mean),
            "adapted_variance": (self.adapt_memory is not None, variance),
        }

    def _check_weights(self, option):
        """Refuse an option for which a built layer would need other weights."""
        axes = self._channel_axes([None] * self.input_spec.ndim, sizes_known=False)
        fits = axes == self._axes and all(
            needed == (getattr(self, name) is not None)
            for name, (needed, _) in self._weight_options(()).items()
        )
        if not fits:
            raise ValueError(
                f"`{option}` cannot be set to {getattr(self, option)!r} in the built "
                f"layer {self.name!r}, for the layer would need other weights. Make a "
                "new layer with this option."
            )

    def _apply_option(self, name):
        """Let the variables know of an option; gives whether others train now."""
        before = [weight.trainable for weight in self.weights]
        if name == "freeze_affine":
            for weight in (self.gamma, self.beta):
                if weight is not None:
                    weight.trainable = self.trainable
            self._freeze_parameters()
        parameter, _, kind = name.partition("_")
        if kind in ("regularizer", "constraint"):
            weight = getattr(self, parameter)
            if weight is not None:
                setattr(weight, kind, getattr(self, name))
        if not self.freeze_statistics:
            self.fused = False
        return before != [weight.trainable for weight in self.weights]

    def _freeze_parameters(self):
        """Let the parameters that `freeze_affine` names not train."""
        for name in arguments.AFFINE:
            weight = getattr(self, name, None)
            if weight is not None and self.freeze_affine in (True, name):
                weight.trainable = False

    @property
    def _rule(self):
        return moving.Rule(self.momentum, self.debias, self.unbiased)

    @property
    def _scheduled(self):
        """Whether momentum, or a bound of renormalization, follows the updates."""
        bounds = (self.renorm_clipping or {}).values() if self.renorm else ()
        return any(callable(value) for value in (self.momentum, *bounds))

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
    def adapts(self) -> bool:
        """Whether inference follows its inputs: see `keras_bn.adapt`."""
        return self.adapt_prior is not None or self.adapt_memory is not None

    @property
    def _adapted(self):
        """The running statistics of the inputs in inference; None without."""
        if self.adapt_memory is None:
            return None
        return step.State(self.adapted_mean.value, self.adapted_variance.value)

    @property
    def _affine(self) -> Any:
        return [None if w is None else w.value for w in (self.gamma, self.beta)]

    @property
    def _momentum(self):
        """The momentum of the next update, if it follows a schedule; else None."""
        if not callable(self.momentum):
            return None
        return self.momentum(ops.max(self.updates.value))

    @property
    def _bounds(self):
        """The present bounds of renormalization; None without it."""
        if not self.renorm:
            return None
        updates = None if self.updates is None else self.updates.value
        return renorm.bounds(self.renorm_clipping, updates, self.moving_mean.dtype)


class _Mask(keras.layers.Layer):
    """Takes the mask that Keras keeps with a tensor."""

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        self.mask = mask
        return inputs


def _mask_of(inputs: Tensor) -> Tensor | None:
    """The mask that Keras keeps with a tensor, or None.

    Keras gives it to a layer with a single tensor argument only.
    """
    layer = _Mask(name="mask", autocast=False)
    layer.supports_masking = True
    layer(inputs)
    return layer.mask
