"""Freezing the statistics of a model at a step of its training."""

from typing import Any

from keras_bn.layer.arguments import whole
from keras_bn.passes.data import Logs
from keras_bn.surgery.arrays import float64
from keras_bn.surgery.private import require
from keras_bn.surgery.view import ModelView
from keras_bn.tools.freeze import check_any, freeze
from keras_bn.tools.steps import StepCallback


class FreezeAfter(StepCallback):
    """Freezes the statistics of the fitted model after so many steps.

    It calls `keras_bn.freeze(model)` once. For a model from `keras_bn.quantize_aware`,
    the last part of training then runs with the very weights of the file. With
    `steps_per_execution`, it waits for the execution to end in which the step is.

    Where another callback resumes an interrupted training when `fit` begins, such as
    `keras.callbacks.BackupAndRestore`, the steps that it restores count as well: those
    by which `model.optimizer.iterations` goes up.

    Args:
        steps: how many steps of training come before; those of several `fit` together.
            The last execution of an epoch counts as a whole one if Keras does not know
            how many steps an epoch has.

    Raises:
        ValueError: if `steps` is no whole number, 0 or greater; and when `fit` begins,
            if the model has no `keras_bn.BatchNormalization`.

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
        require("keras_bn.FreezeAfter", "layers")
        super().__init__()
        try:
            self.steps = whole(steps)
        except ValueError:
            self.steps = -1
        if self.steps < 0:
            raise ValueError(
                f"`steps` must be a whole number, 0 or greater. Received: {steps!r}"
            )
        self._done, self._frozen = 0, False
        self._restored_from: int | None = None

    def set_model(self, model: Any) -> None:
        # Keras calls this on all callbacks before the first can restore anything.
        super().set_model(model)
        self._restored_from = _steps_of_optimizer(model)

    def on_train_begin(self, logs: Logs = None) -> None:
        if self.model.built:  # what could not be frozen later is refused now
            check_any(ModelView(self.model), "freeze")
        self._count_restored()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self._count_restored()
        self._restored_from = None

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self._done += self.count_steps()
        self._freeze_if_due()

    def _count_restored(self):
        """Count the steps that were restored since the callback got its model."""
        if self._restored_from is not None:
            now = _steps_of_optimizer(self.model)
            self._done += now - self._restored_from
            self._restored_from = now
        self._freeze_if_due()

    def _freeze_if_due(self):
        if not self._frozen and self._done >= self.steps:
            freeze(self.model)
            self._frozen = True


def _steps_of_optimizer(model):
    """How many steps of training an optimizer has taken part in."""
    optimizer = getattr(model, "optimizer", None)
    iterations = getattr(optimizer, "iterations", None)
    if iterations is None:
        return 0
    # Keras counts the updates, of which each may be of several steps.
    steps_per_update = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    return int(float64(iterations)) * steps_per_update
