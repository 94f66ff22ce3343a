"""Freezing parts of a layer, independently of `trainable`."""

import gc

import keras

AFFINE = ("gamma", "beta")


class Freezable(keras.layers.Layer):
    """A layer whose statistics and parameters can be frozen separately.

    Setting `trainable` on a model does not change what is frozen here. It is saved with
    the layer. A change takes effect in the next step of every model that holds the
    layer, also during `fit`.
    """

    _freeze_statistics = False
    _freeze_affine: bool | str = False
    # Whether to follow the notes of linear layers: `keras_bn.freeze(model, fuse=True)`.
    _fused = False

    @property
    def freeze_statistics(self) -> bool:
        """Whether training uses the moving statistics and does not change them."""
        return self._freeze_statistics

    @freeze_statistics.setter
    def freeze_statistics(self, value: bool) -> None:
        if self.set_frozen(statistics=value):
            forget_traces([self])

    @property
    def freeze_affine(self) -> bool | str:
        """Whether gamma and beta do not train; or the name of the one that doesn't."""
        return self._freeze_affine

    @freeze_affine.setter
    def freeze_affine(self, value: bool | str) -> None:
        if self.set_frozen(affine=check_affine(value)):
            forget_traces([self])

    @property
    def trainable(self) -> bool:
        """Whether the layer trains; if not, all of it is frozen."""
        return keras.layers.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        self._hold_affine()

    def set_frozen(
        self,
        statistics: bool | None = None,
        affine: bool | str | None = None,
        fused: bool | None = None,
    ) -> bool:
        """Freeze or unfreeze. The caller has to call `forget_traces`.

        Args:
            statistics, affine: the new `freeze_statistics` and `freeze_affine`; None
                to leave them as they are.
            fused: whether to be computed as one with the linear layer before it, for
                as long as the statistics are frozen; None as above.

        Returns:
            Whether anything changed.
        """
        before = self._frozen()
        if affine is not None:
            self._freeze_affine = affine
            for _, parameter in self._affine_parameters():
                parameter.trainable = self.trainable
            self._hold_affine()
        if statistics is not None:
            self._freeze_statistics = bool(statistics)
        if fused is not None:
            self._fused = fused
        self._fused = self._fused and self._freeze_statistics
        return before != self._frozen()

    def _frozen(self):
        flags = [parameter.trainable for _, parameter in self._affine_parameters()]
        return self._freeze_statistics, self._freeze_affine, self._fused, flags

    def _hold_affine(self):
        """Make frozen parameters not trainable."""
        for name, parameter in self._affine_parameters():
            if self._freeze_affine in (True, name):
                parameter.trainable = False

    def _affine_parameters(self):
        named = [(name, getattr(self, name, None)) for name in AFFINE]
        return [(name, variable) for name, variable in named if variable is not None]


def check_affine(value):
    """`freeze_affine` as a bool, or as the name of one parameter."""
    if not isinstance(value, bool) and value not in AFFINE:
        raise ValueError(
            "`freeze_affine` must be True, False, 'gamma' or 'beta'. "
            f"Received: freeze_affine={value!r}"
        )
    return value


def forget_traces(layers):
    """Make every model that holds one of these layers trace its steps again.

    A layer does not know its models, so this searches all objects in memory. It does
    not find a `tf.function` that the user made.
    """
    ids = {id(v) for layer in layers if layer.built for v in layer.variables}
    if not ids:
        return
    for model in gc.get_objects():
        # isinstance() reads `__class__` of the object, and lazy modules then import.
        if not issubclass(type(model), keras.Model) or not getattr(
            model, "built", False
        ):
            continue
        if any(id(variable) in ids for variable in model.variables):
            # Not set to None: a running `fit` calls it again at once.
            for name in ("train", "test", "predict"):
                if getattr(model, f"{name}_function", None) is not None:
                    getattr(model, f"make_{name}_function")(force=True)
