"""Reading data: whatever `fit` takes, batch by batch."""

import contextlib
import warnings
from typing import Any, Literal

import keras
import numpy as np

from keras_bn.passes.progress import Progress
from keras_bn.surgery.data import Source
from keras_bn.surgery.private import require


class NoDataError(ValueError):
    """Data that has no batch, or none left."""

    def __init__(self) -> None:
        super().__init__("There is no data: not one batch came.")


# As in `fit`; and what it gives callbacks.
Verbose = Literal["auto", 0, 1, 2]
Logs = dict[str, Any] | None


def batches(
    x,
    y=None,
    sample_weight=None,
    *,
    steps=None,
    batch_size=None,
    verbose=0,
    label="reading",
):
    """The batches of any data that `fit` takes, with a progress bar.

    Args:
        x, y, sample_weight: as in `fit`.
        steps: how many batches to take; None for all.
        batch_size: for arrays; 32 by default.
        verbose: `"auto"`, 0, 1 or 2, as in `fit`.
        label: what the progress bar says is going on.

    Returns:
        An iterator of `(x, y, sample_weight)`; a missing part is None.

    Raises:
        ValueError: for endless data, if `steps` is None.

    Warns:
        UserWarning: if the data ends before `steps` batches.
    """
    epoch: Any
    if hasattr(x, "__next__"):
        source, total, epoch = x, steps, contextlib.nullcontext()
    else:
        source = epoch = Source(x, y, sample_weight, steps, batch_size)
        total = source.total
    progress = Progress(label, total, verbose)
    count = 0
    with epoch:
        # Do not take one batch too many out of a generator.
        for batch in () if total == 0 else source:
            batch = keras.tree.map_structure(_dense, batch)
            yield keras.utils.unpack_x_y_sample_weight(batch)
            count += 1
            progress.update(count)
            if count == total:
                break
    progress.close(count)
    if count and steps is not None and count < steps:
        warnings.warn(
            f"The data ended after {count} batches. Received: steps={steps}",
            stacklevel=2,
        )


def finite_samples(parts):
    """Which samples are finite in all parts of a batch, or of data in arrays.

    Args:
        parts: a nest of arrays and tensors, in which None may stand for one.
    """
    leaves = [leaf for leaf in keras.tree.flatten(parts) if leaf is not None]
    valid = np.ones(int(leaves[0].shape[0]), bool)
    for leaf in leaves:
        values = np.asarray(keras.ops.convert_to_numpy(leaf))
        if values.dtype.kind in "fc" or "float" in values.dtype.name:
            values = values.astype("float32") if values.itemsize < 4 else values
            valid &= np.isfinite(values).all(tuple(range(1, values.ndim)))
    return valid


def _dense(value):
    """An array for a sparse matrix of SciPy, which `fit` takes too."""
    return value.toarray() if hasattr(value, "toarray") else value


def check_end(data, steps):
    """Refuse endless data without `steps`.

    Raises:
        ValueError: for a generator, or data known to be endless, without `steps`.
    """
    if steps is not None:
        return
    if hasattr(data, "__next__"):
        raise ValueError(
            "A generator goes on from epoch to epoch, so `steps` must say how many "
            "batches to take each time. Received: steps=None"
        )
    Source(*(data if isinstance(data, tuple) else (data,)))


def check_call(model):
    """Refuse a model that data cannot go through, such as the outer one of a GAN.

    Raises:
        ValueError: if its class has no `call`.
    """
    if getattr(type(model), "call", None) is keras.Model.call:
        raise ValueError(
            f"'{model.name}' has no `call`, so data cannot go through it. Pass the "
            "part that has the batch normalizations: callbacks take `model=`."
        )


class DataCallback(keras.callbacks.Callback):
    """A callback that runs data through the fitted model, or through a part of it.

    Args:
        data: as in `keras_bn.recalibrate` or `keras_bn.diagnose`.
        part: the model to run, if it is not the fitted one.
    """

    def __init__(self, data: Any, part: keras.Model | None) -> None:
        tool = f"keras_bn.{type(self).__name__}"
        require(tool, "layers", "graph", "copy", "data")
        super().__init__()
        self._data, self._part = data, part

    @property
    def _target(self):
        return self.model if self._part is None else self._part

    def _check(self, steps):
        """Refuse, when `fit` begins, what could not run later."""
        check_end(self._data, steps)
        check_call(self._target)
        self._warned: set[str] = set()

    def _warn_once(self, reason, message):
        """Warn of what a callback cannot do, instead of ending the training.

        Args:
            reason: the same warning comes once in a `fit`.
            message: text of the warning.
        """
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=3)
