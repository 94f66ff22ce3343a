"""Any data that `fit` takes, as batches, by what Keras's `fit` reads it with."""

from keras_bn.surgery import private


class Source:
    """The batches of any data that `fit` takes.

    Args:
        x, y, sample_weight: as in `fit`.
        steps: how many batches to take; None for all.
        batch_size: for arrays; 32 by default.

    Attributes:
        total: the number of batches; None if it is not known.

    Raises:
        ValueError: for endless data, if `steps` is None, and for a data set that is
            distributed over replicas.
    """

    def __init__(self, x, y=None, sample_weight=None, steps=None, batch_size=None):
        iterator = private.EpochIterator(
            x, y, sample_weight, batch_size=batch_size or 32, steps_per_epoch=steps
        )
        self._adapter = iterator.data_adapter
        # The data set itself: arrays made of its batches would lose what is ragged.
        self.data_set = None
        if isinstance(self._adapter, private.TFDatasetAdapter):
            self.data_set = self._adapter.get_tf_dataset()
            if not hasattr(self.data_set, "batch"):
                raise ValueError(
                    "The data set is distributed over replicas. Give the data set "
                    f"before `experimental_distribute_dataset`. Received: {x!r}"
                )
        self.total = self._adapter.num_batches if steps is None else steps
        if self.total is None and self._is_endless():
            raise ValueError(
                "The data has no end: give `steps`, the number of batches to take. "
                f"Received: {x!r} and steps=None"
            )

    def __enter__(self):
        self._adapter.on_epoch_begin()
        return self

    def __exit__(self, *error):
        self._adapter.on_epoch_end()

    def __iter__(self):
        """The batches: arrays, or tensors of a `tf.data.Dataset`."""
        if self.data_set is not None:
            return iter(self.data_set)
        return iter(self._adapter.get_numpy_iterator())

    def _is_endless(self):
        if self.data_set is not None:
            return int(self.data_set.cardinality()) == -1
        return isinstance(self._adapter, private.PyDatasetAdapter)
