"""The diagnosis of a model: a table, findings, a dict, a figure."""

import math
import os
import textwrap
from dataclasses import dataclass
from typing import Any

import keras

from keras_bn.diagnosis.collect import LayerRecord, ModelRecord, collect
from keras_bn.diagnosis.findings import ERROR, WARNING, Finding, findings
from keras_bn.tools.norms import warn_of_others
from keras_bn.tools.observe import Verbose


def diagnose(
    model: keras.Model,
    data: Any,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    verbose: Verbose = 0,
) -> "Report":
    """Say what is wrong with the batch normalizations of a model, and how to fix it.

    If a model trains well and evaluates badly, its moving statistics are usually not
    those of its data. This runs the data through the model twice, with the moving
    statistics and with the statistics of each batch, everything else in inference, and
    compares. The model does not change.

    Args:
        model: a built model, with layers of ours or Keras's.
        data: inputs as in training, as `fit` takes them: arrays, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator with `steps`. With labels, as a
            tuple `(x, y)` or in the data set, this also compares the loss of `evaluate`
            and the accuracy; `(x, y, sample_weight)` weights the samples in the loss.
        steps: how many batches to take; all of them by default.
        batch_size: for arrays; 32 by default. Use that of training, and a random
            order.
        verbose: `"auto"`, 0, 1 or 2, as in `fit`.

    Returns:
        A `Report`: `print(report)` shows it, `report.findings` lists what was found,
        `report.plot("report.png")` draws it, `report.to_html()` is a page.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: for a model that is not built or has no batch normalization, and
            for no data, or endless data without `steps`.

    Warns:
        UserWarning: for layers that it skips because their class has its own `call`.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), keras_bn.BatchNormalization(name="bn")], name="model"
    ... )
    >>> x = np.random.default_rng(0).normal(5.0, 1.0, (200, 2))
    >>> for finding in keras_bn.diagnose(model, x).findings:
    ...     print(finding.kind, finding.layer, finding.remedy)
    never-updated bn keras_bn.recalibrate(model, data)
    train-inference-gap model keras_bn.recalibrate(model, data)
    >>> _ = keras_bn.recalibrate(model, x, verbose=0)
    >>> keras_bn.diagnose(model, x).findings
    []
    """
    record = collect(model, data, steps=steps, batch_size=batch_size, verbose=verbose)
    warn_of_others(model)
    return Report(record, findings(record))


@dataclass
class Report:
    """What `keras_bn.diagnose` found.

    Args:
        record: the `ModelRecord`, with all the numbers.
        findings: a list of `Finding` (`kind`, `layer`, `severity`, `message`,
            `remedy`), most severe first.
    """

    record: ModelRecord
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether no finding is more severe than a note."""
        return not any(f.severity in (ERROR, WARNING) for f in self.findings)

    def layer(self, path: str) -> LayerRecord:
        """The record of the layer with this path."""
        return next(each for each in self.record.layers if each.layer == path)

    def __str__(self) -> str:
        record = self.record
        lines = [
            f"{record.model}: {record.samples} samples in {record.batches} batches"
        ]
        for name, pair in (("loss", record.loss), ("accuracy", record.accuracy)):
            if pair is not None:
                lines.append(
                    f"{name} {pair[0]:.4g} in inference, {pair[1]:.4g} with the "
                    "statistics of each batch"
                )
        lines += ["", *_table(_HEADER, [_row(each) for each in record.layers])]
        if record.not_called:
            lines += ["", f"Not called: {', '.join(record.not_called)}"]
        lines.append("")
        for finding in self.findings:
            lines += [
                f"{finding.severity:7} {finding.kind}: {finding.layer}",
                *_wrapped(finding.message),
                *_wrapped(f"-> {finding.remedy}"),
            ]
        if not self.findings:
            lines.append("No problems found.")
        elif self.healthy:
            lines.append("No errors, no warnings.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types, ready for JSON; NaN and infinity become None."""
        record = self.record
        return {
            "model": record.model,
            "samples": record.samples,
            "batches": record.batches,
            "steps": record.steps,
            "healthy": self.healthy,
            "output_gap": _plain(record.gap),
            "loss": _both_ways(record.loss),
            "accuracy": _both_ways(record.accuracy),
            "layers": [_layer_dict(each) for each in record.layers],
            "not_called": list(record.not_called),
            "findings": [finding._asdict() for finding in self.findings],
        }

    def to_html(self) -> str:
        """The report as one page of HTML that loads nothing; a string."""
        from keras_bn.diagnosis.html import page

        return page(self.record, self.findings)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw each layer's drift over its channels, and its output gap.

        Args:
            path: where to save the figure, if anywhere.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        from keras_bn.diagnosis.plots import draw

        figure = draw(self.record, self.findings)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


_HEADER = (
    ("", "elements", "mean off, in std", "", "std ratio", "", "output"),
    ("layer", "per batch", "median", "worst", "median", "worst", "gap"),
)


def _row(layer):
    numbers = (*layer.drift, layer.gap)
    return [layer.layer, f"{layer.elements:,.0f}", *(f"{n:.2f}" for n in numbers)]


def _table(header, rows):
    table = [*header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    lines.insert(len(header), "  ".join("-" * width for width in widths))
    return lines


def _wrapped(text):
    return textwrap.wrap(text, 80, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _layer_dict(layer):
    drift = layer.drift
    return {
        "layer": layer.layer,
        "channels": int(layer.moving_mean.size),
        "momentum": layer.momentum,
        "epsilon": layer.epsilon,
        "frozen": layer.frozen,
        "inference_mode": layer.inference_mode,
        "elements_per_batch": layer.elements,
        "elements": int(layer.data.count.min()),
        "mean_drift": {"median": _plain(drift.mean), "worst": _plain(drift.worst_mean)},
        "log_variance_ratio": {
            "median": _plain(2 * _log(drift.ratio)),
            "worst": _plain(2 * _log(drift.worst_ratio)),
        },
        "output_gap": _plain(layer.gap),
    }


def _log(value):
    return math.log(value) if value > 0 else math.nan


def _both_ways(pair):
    return pair and dict(zip(("inference", "training"), map(_plain, pair), strict=True))


def _plain(value):
    value = float(value)
    return value if math.isfinite(value) else None
