"""Counting the steps of training in a callback."""

from typing import Any

import keras

from keras_bn.passes.data import Logs


class StepCallback(keras.callbacks.Callback):
    """A callback that knows how many steps of an epoch are done.

    Keras calls `on_train_batch_end` once for all steps of `steps_per_execution`. Keras
    3.10 names the first of these batches there, later releases the last, as if none
    were missing at the end of an epoch.
    """

    # How many steps of this epoch are done, and how many one execution is.
    done_of_epoch, _together = 0, 1

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        self._together = getattr(model, "steps_per_execution", 1)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self.done_of_epoch = 0

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        self.done_of_epoch = batch

    def count_steps(self) -> int:
        """How many steps have just ended: for `on_train_batch_end`, once."""
        end = self.done_of_epoch + self._together
        if self.epoch_length is not None:
            end = min(end, self.epoch_length)
        count, self.done_of_epoch = end - self.done_of_epoch, end
        return count

    @property
    def epoch_length(self) -> int | None:
        """How many steps an epoch has, if Keras knows."""
        return (self.params or {}).get("steps")
