"""Freezing the statistics of a model at a step of its training."""

from typing import Any

import keras

from keras_bn.tools.freeze import freeze


class FreezeAfter(keras.callbacks.Callback):
    """Freezes the statistics of the fitted model after so many steps.

    It calls `keras_bn.freeze(model)` once. For a model from `keras_bn.quantize_aware`,
    the last part of training then runs with the very weights of the file.

    Args:
        steps: how many steps of training come before; those of several `fit` together.

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
        self._done, self._before, self._frozen = 0, -1, False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._before = -1
        self._freeze_if_due()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._before = -1

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # With `steps_per_execution`, the batches of one execution end together.
        self._done += batch - self._before
        self._before = batch
        self._freeze_if_due()

    def _freeze_if_due(self):
        if not self._frozen and self._done >= self.steps:
            freeze(self.model)
            self._frozen = True
