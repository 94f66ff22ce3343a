"""Recording the drift of moving statistics during `fit`."""

import csv
import io
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import keras

from keras_bn.diagnosis.collect import Collector, check_any
from keras_bn.diagnosis.drift_plot import draw
from keras_bn.diagnosis.events import Events
from keras_bn.pages.files import check_writable, write_whole
from keras_bn.passes.data import DataCallback, Logs, NoDataError
from keras_bn.surgery.norms import warn_of_others

# After so many samples the output gap is known, and saving a pass is worth a trace.
COMPARED = 1024


class DriftRow(NamedTuple):
    """One layer after some epochs; the model's own row has only the output gap.

    Args:
        epoch: number of epochs done; 0 is before the first.
        layer: the path of the layer, or the name of the model.
        mean_drift, worst_mean_drift: |moving mean − mean of the data| in standard
            deviations of the data: median over the channels and worst channel.
        log_variance_ratio, worst_log_variance_ratio: log((moving variance + epsilon) /
            (variance of the data + epsilon)): median and worst.
        output_gap: root mean square of the difference between the outputs in training
            and inference, relative to their standard deviation; over the first 1,024
            samples.
    """

    epoch: int
    layer: str
    mean_drift: float
    worst_mean_drift: float
    log_variance_ratio: float
    worst_log_variance_ratio: float
    output_gap: float


class StatisticsLogger(DataCallback):
    """Records how far moving statistics are from the data's during training.

    Before the first epoch and after each, `data` goes through the model as in
    `keras_bn.diagnose`. For each normalization, `keras_bn` or Keras, this compares the
    moving statistics with those of all the data at that layer: this is the error of
    inference. The change since the last epoch would be cheaper but says less: it is
    zero both for statistics that have arrived and for those that nothing updates.

    It costs two passes over the first 1,024 samples of `data`, at the speed of
    `predict`, and one over the others, which count for the statistics alone: a few
    hundred samples are enough. Nothing in the model changes. Beside
    `keras_bn.Recalibrate`, it records the drift that remains.

    It does not end a training: where no data is left, or the file can no longer be
    written, it warns once.

    Args:
        data: as in `keras_bn.diagnose`, from the training data and in random order; a
            generator goes on from epoch to epoch.
        filename: the CSV file to write, if any: a `DriftRow` per layer and epoch, and
            one for the model. It is rewritten after each epoch.
        log_dir: a folder for TensorBoard, if any: scalars by the name of the column and
            the path of the layer, with the epoch as the step. It needs the package
            `tensorboard`.
        append: whether `fit` keeps the present rows, from the file if there is one. It
            drops rows after its first epoch (`initial_epoch`). Without `append` it
            drops all rows.
        model: the model to look at, if that is only a part of the fitted one, such as
            the generator of a GAN.
        steps, batch_size: as in `keras_bn.diagnose`.

    Raises:
        OSError: when `fit` begins, if the file cannot be written.
        ValueError: when `fit` begins, for `append` to a file with other columns, for a
            model without batch normalization, and for endless data without `steps`.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), keras_bn.BatchNormalization(name="bn")], name="model"
    ... )
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(5.0, 1.0, (320, 2))
    >>> logger = keras_bn.StatisticsLogger(x)
    >>> history = model.fit(x, x, epochs=20, callbacks=[logger], verbose=0)
    >>> for row in logger.rows:
    ...     if row.layer == "bn" and row.epoch % 10 == 0:
    ...         print(row.epoch, f"{row.mean_drift:.1f}")
    0 5.0
    10 1.8
    20 0.7
    >>> figure = logger.plot()
    """

    def __init__(
        self,
        data: Any,
        filename: str | os.PathLike[str] | None = None,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        append: bool = False,
        model: keras.Model | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(data, model)
        self.filename, self.log_dir, self.append = filename, log_dir, append
        self.rows: list[DriftRow] = []
        self._options = {"steps": steps, "batch_size": batch_size, "verbose": 0}
        self._events: Events | None = None
        self._collector: Collector | None = None

    def on_train_begin(self, logs: Logs = None) -> None:
        self._check(self._options["steps"])
        if self._target.built:
            check_any(self._target)
        rows = self.rows if self.append else []
        if self.filename is not None:
            check_writable(self.filename, force=True)
            if self.append and Path(self.filename).exists():
                rows = _read(self.filename)
        self.rows = rows
        if self.log_dir is not None:
            self._events = Events(self.log_dir)
        if self._target.built:
            warn_of_others(self._target)
        self._begun, self._collector = False, None

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        if not self._begun:
            self._begun = True
            self.rows = [row for row in self.rows if row.epoch <= epoch]
            if not any(row.epoch == epoch for row in self.rows):
                self._record(epoch)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._record(epoch + 1)

    def on_train_end(self, logs: Logs = None) -> None:
        self._collector = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the drift and the output gap of each layer over the epochs.

        Args:
            path: where to save the figure, if anywhere.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ValueError: if nothing was recorded yet.
        """
        if not self.rows:
            raise ValueError("Nothing was recorded yet: pass this to `fit` first.")
        figure = draw(self.rows)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _record(self, epoch):
        try:
            # Made anew if a layer has been replaced or has other options: it is traced.
            if self._collector is None or not self._collector.is_current():
                self._collector = Collector(self._target)
            record = self._collector.collect(
                self._data, compared=COMPARED, **self._options
            )
        except NoDataError:
            self._warn_once(
                "ended",
                "the data has no batch left, so nothing more is recorded; training "
                "goes on. A generator must give `steps` batches for each epoch, and "
                "for the start.",
            )
            return
        for reason, message in self._collector.left_out().items():
            self._warn_once(reason, message)
        new = [_row(epoch, layer) for layer in record.layers]
        nan = math.nan
        new.append(DriftRow(epoch, record.model, nan, nan, nan, nan, record.gap))
        self.rows += new
        if self.filename is not None:
            text = _written(self.rows)
            try:
                write_whole(
                    self.filename,
                    lambda path: path.write_text(text, encoding="utf-8"),
                    force=True,
                )
            except OSError as error:
                self._warn_once(
                    "file",
                    f"{self.filename} can't be written ({error}); `rows` has all.",
                )
        if self._events is not None:
            self._events.write(epoch, dict(_scalars(new)))


def _row(epoch, layer):
    drift = layer.drift
    return DriftRow(
        epoch,
        layer.layer,
        drift.mean,
        drift.worst_mean,
        _log_of_square(drift.ratio),
        _log_of_square(drift.worst_ratio),
        layer.gap,
    )


def _log_of_square(value):
    return 2 * math.log(value) if value > 0 else math.nan


def _scalars(rows):
    """Pairs of tag and value, with a section in TensorBoard for each column."""
    for row in rows:
        for column, value in zip(DriftRow._fields[2:], row[2:], strict=True):
            if not math.isnan(value):
                yield f"{column}/{row.layer}", value


def _written(rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(DriftRow._fields)
    writer.writerows(rows)
    return text.getvalue()


def _read(filename):
    with open(filename, encoding="utf-8", newline="") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    if tuple(header) != DriftRow._fields:
        raise ValueError(
            "`append=True` needs a file with the columns "
            f"{', '.join(DriftRow._fields)}. Received: {filename} with the columns "
            f"{', '.join(header) or 'none'}"
        )
    return [
        DriftRow._make([int(epoch), layer, *map(float, numbers)])
        for epoch, layer, *numbers in lines
    ]
