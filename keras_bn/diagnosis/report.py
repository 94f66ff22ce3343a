"""The diagnosis of a model, and what can be done with it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras

from keras_bn.diagnosis import text
from keras_bn.diagnosis.collect import collect, read
from keras_bn.diagnosis.comparison import Fixed
from keras_bn.diagnosis.findings import Finding, findings
from keras_bn.diagnosis.fixes import recalibrated
from keras_bn.diagnosis.records import LayerRecord, ModelRecord
from keras_bn.diagnosis.rules import ERROR, RULES, SEVERITIES, WARNING, ignored_kinds
from keras_bn.pages.plain import number
from keras_bn.passes.observe import Verbose, check_end
from keras_bn.surgery.norms import warn_of_others

# Of the dict; it grows when a key goes away or changes its meaning.
SCHEMA_VERSION = 1


def diagnose(
    model: keras.Model,
    data: Any = None,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    ignore: Sequence[str] = (),
    verbose: Verbose = 0,
) -> "Report":
    """Say what is wrong with the batch normalizations of a model, and how to fix it.

    If a model trains well and evaluates badly, its moving statistics are usually not
    those of its data. This runs the data through the model twice, with the moving
    statistics and with the statistics of each batch, everything else in inference, and
    compares. The model does not change.

    Without data, it finds what the model itself shows: lost, negative or initial
    statistics, dead channels, large means, small gammas, frozen layers, idle biases.
    The report says which findings were not looked for.

    Args:
        model: a built model, with layers of ours or Keras's.
        data: inputs as in training, as `fit` takes them: arrays, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator with `steps`. With labels, as a
            tuple `(x, y)` or in the data set, this also compares the loss of `evaluate`
            and the accuracy; `(x, y, sample_weight)` weights the samples in the loss.
        steps: how many batches to take; all of them by default.
        batch_size: for arrays; 32 by default. Use that of training, and a random
            order.
        ignore: findings to leave out, by id or kind: `["BN007", "frozen"]`.
        verbose: `"auto"`, 0, 1 or 2, as in `fit`.

    Returns:
        A `Report`: `print(report)` shows it, a notebook displays it, `report.open()`
        opens it in a browser; `report.findings` lists what was found, `report.fix()`
        applies the remedies that change statistics only.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: for a model that is not built or has no batch normalization, for
            no data, endless data without `steps`, and an unknown rule in `ignore`.

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
    never-updated bn keras_bn.recalibrate(model, x)
    train-inference-gap model keras_bn.recalibrate(model, x)
    >>> _ = keras_bn.recalibrate(model, x, verbose=0)
    >>> keras_bn.diagnose(model, x).findings
    []
    """
    kinds = ignored_kinds(ignore)
    if data is None:
        if steps is not None or batch_size is not None:
            raise ValueError(
                "`steps` and `batch_size` are about `data`, and there is none. "
                f"Received: steps={steps} and batch_size={batch_size}"
            )
        record = read(model)
    else:
        options = {"steps": steps, "batch_size": batch_size, "verbose": verbose}
        record = collect(model, data, **options)
    warn_of_others(model)
    every = findings(record)
    return Report(
        record,
        [each for each in every if each.kind not in kinds],
        [each for each in every if each.kind in kinds],
        _Source(model, data, steps, batch_size, tuple(kinds)),
    )


@dataclass
class _Source:
    """What was diagnosed, and how."""

    model: keras.Model
    data: Any
    steps: int | None
    batch_size: int | None
    ignore: tuple[str, ...]


@dataclass
class Report:
    """What `keras_bn.diagnose` found.

    Args:
        record: the `ModelRecord`, with all the numbers.
        findings: a list of `Finding` (`kind`, `layer`, `severity`, `message`,
            `remedy`), most severe first.
        ignored: those that `ignore` has left out.
    """

    record: ModelRecord
    findings: list[Finding]
    ignored: list[Finding] = field(default_factory=list)
    _source: _Source | None = field(default=None, repr=False, compare=False)

    @property
    def healthy(self) -> bool:
        """Whether no finding is more severe than a note."""
        return not self.at_least(WARNING)

    @property
    def not_looked_for(self) -> list[str]:
        """The kinds of findings that need data, if there was none."""
        if self.record.has_data:
            return []
        return [rule.kind for rule in RULES.values() if rule.needs_data]

    def at_least(self, severity: str) -> list[Finding]:
        """The findings of a severity, or more severe.

        Args:
            severity: `"error"`, `"warning"` or `"note"`.
        """
        severe = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return [finding for finding in self.findings if finding.severity in severe]

    def layer(self, path: str) -> LayerRecord:
        """The record of the layer with this path."""
        return next(each for each in self.record.layers if each.layer == path)

    def __str__(self) -> str:
        return "\n".join(text.lines_of(self))

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types, ready for JSON; NaN and infinity become None.

        Its JSON Schema is `docs/report.schema.json`.
        """
        record = self.record
        return {
            "schema_version": SCHEMA_VERSION,
            "model": record.model,
            "samples": record.samples,
            "batches": record.batches,
            "steps": record.steps,
            "healthy": self.healthy,
            "output_gap": number(record.gap),
            "loss": _both_ways(record.loss),
            "accuracy": _both_ways(record.accuracy),
            "layers": [_layer_dict(each) for each in record.layers],
            "not_called": list(record.not_called),
            "findings": [each.to_dict() for each in self.findings],
            "ignored": [each.to_dict() for each in self.ignored],
            "not_looked_for": self.not_looked_for,
        }

    def to_html(self, int8: Any = None) -> str:
        """The report as one page of HTML that loads nothing.

        Args:
            int8: what `keras_bn.export_int8` has returned for the model; its layers
                then follow those of the diagnosis.

        Returns:
            A string.

        Raises:
            TypeError: if `int8` is something else.
        """
        from keras_bn.diagnosis.html import page

        if int8 is not None and not hasattr(int8, "section"):
            raise TypeError(
                "`int8` must be what keras_bn.export_int8 returns. Received: "
                f"int8={int8!r}"
            )
        return page(self, int8)

    def _repr_html_(self):
        from keras_bn.diagnosis.html import fragment

        return fragment(self)

    def open(self, int8: Any = None) -> Path:
        """Show the page in the browser.

        Args:
            int8: as in `to_html`.

        Returns:
            The path of the page, a temporary file.

        Raises:
            TypeError: as `to_html`.

        Warns:
            UserWarning: if there is no browser.
        """
        from keras_bn.pages.display import opened

        return opened(self.to_html(int8), self.record.model)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw each layer's drift over its channels, and its output gap.

        Args:
            path: where to save the figure, if anywhere.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ValueError: for a report without data, which has no drift.
        """
        from keras_bn.diagnosis.plots import draw

        if not self.record.has_data:
            raise ValueError(
                "The figure shows the drift from the data, and this report is without: "
                "keras_bn.diagnose(model, data).plot()"
            )
        figure = draw(self.record, self.findings)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def fix(
        self,
        data: Any = None,
        *,
        steps: int | None = None,
        batch_size: int | None = None,
    ) -> Fixed:
        """Apply the remedies that change statistics only, then diagnose again.

        If an error or a warning has such a remedy, this recalibrates the layers that
        are not frozen, and those frozen ones whose statistics are an error. No weight
        changes. If anything fails, the model does not change.

        Args:
            data: as in `keras_bn.diagnose`; by default what was diagnosed. Other data
                is diagnosed first.
            steps, batch_size: for `data`, as in `keras_bn.diagnose`.

        Returns:
            A `Fixed`: the reports before and after, and what was done.

        Raises:
            ValueError: if there is no data, or a generator without `steps`.

        Example:

        >>> import keras, keras_bn, numpy as np
        >>> norm = keras_bn.BatchNormalization(name="bn")
        >>> model = keras.Sequential([keras.Input((2,)), norm])
        >>> x = np.random.default_rng(0).normal(5.0, 1.0, (200, 2))
        >>> fixed = keras_bn.diagnose(model, x).fix()
        >>> list(fixed.recalibrated), fixed.after.findings
        (['bn'], [])
        """
        source = self._source
        if source is None:
            raise ValueError(
                "This report does not hold its model: take the one that "
                "`keras_bn.diagnose` returns."
            )
        if data is not None:
            check_end(data, steps)
            again: Any = {"steps": steps, "batch_size": batch_size}
            before = diagnose(source.model, data, ignore=source.ignore, **again)
            return before.fix()
        if source.data is None:
            raise ValueError(
                "Recalibration needs data, and this report is without: report.fix(data)"
            )
        check_end(source.data, source.steps)
        layers = _to_recalibrate(self)
        if not layers:
            return Fixed(self, self, {})
        options: Any = {"steps": source.steps, "batch_size": source.batch_size}
        found, after = recalibrated(
            source.model,
            layers,
            source.data,
            options,
            lambda: diagnose(
                source.model, source.data, ignore=source.ignore, **options
            ),
        )
        return Fixed(self, after, found)


def _to_recalibrate(report):
    """The paths of the layers whose statistics `fix` replaces."""
    fixable = [
        finding
        for finding in report.at_least(WARNING)
        if finding.fix and finding.fix.statistics_only
    ]
    if not fixable:
        return []
    lost = {finding.layer for finding in fixable if finding.severity == ERROR}
    return [
        each.layer
        for each in report.record.layers
        if not each.frozen or each.layer in lost
    ]


def _layer_dict(layer):
    drift = layer.drift
    known = drift is not None
    return {
        "layer": layer.layer,
        "channels": int(layer.moving_mean.size),
        "momentum": layer.momentum,
        "epsilon": layer.epsilon,
        "frozen": layer.frozen,
        "inference_mode": layer.inference_mode,
        "elements_per_batch": layer.elements,
        "elements": int(layer.data.count.min()) if known else None,
        "mean_drift": _extremes(drift.mean, drift.worst_mean) if known else None,
        "log_variance_ratio": _extremes(
            2 * _log(drift.ratio), 2 * _log(drift.worst_ratio)
        )
        if known
        else None,
        "output_gap": number(layer.gap),
    }


def _extremes(median, worst):
    return {"median": number(median), "worst": number(worst)}


def _log(value):
    return math.log(value) if value > 0 else math.nan


def _both_ways(pair):
    return pair and dict(zip(("inference", "training"), map(number, pair), strict=True))
