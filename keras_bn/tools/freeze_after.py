"""Freezing the statistics of a model at a step of its training."""

from typing import Any

import keras

from keras_bn.tools.freeze import freeze


class FreezeAfter(keras.callbacks.Callback):
    """Freezes the statistics of the fitted model after so many steps.

    It calls `keras_bn.freeze(model)` once. For a model from `keras_bn.quantize_aware`,
    the last part of training then runs with the very weights of the file. With
    `steps_per_execution`, it waits for the execution to end in which the step is.

    Args:
        steps: how many steps of training come before; those of several `fit` together.
            The last execution of an epoch counts as a whole one if Keras does not know
            how many steps an epoch has.

    Raises:
        ValueError: if `steps` is no whole number, 0 or greater.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization()])
    >>> model.compile("sgd", "mse")
    >>> x = np.ones((32, 2))
    >>> callback = keras_bn.FreezeAfter(3)
    >>> history = model.fit(x, x, batch_size=8, verbose=0, callbacks=[callback])
    >>> model.layers[0].freeze_statistics
    True
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(
                f"`steps` must be a whole number, 0 or greater. Received: {steps!r}"
            )
        self.steps = steps
        self._done, self._at, self._frozen = 0, 0, False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._freeze_if_due()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._at = 0

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._at = batch

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # An execution is several batches, of which Keras 3.10 names the first here,
        # and later releases the last, as if none were missing at the end of an epoch.
        end = self._at + self.model.steps_per_execution
        if length := (self.params or {}).get("steps"):
            end = min(end, length)
        self._done += end - self._at
        self._at = end
        self._freeze_if_due()

    def _freeze_if_due(self):
        if not self._frozen and self._done >= self.steps:
            freeze(self.model)
            self._frozen = True
