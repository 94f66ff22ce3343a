"""What a diagnosis found, two of them side by side, and what a fix did."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keras_bn.diagnosis import html, plots, text
from keras_bn.diagnosis.findings import Finding
from keras_bn.diagnosis.records import (
    LayerRecord,
    MeasuredLayer,
    ModelRecord,
    Source,
)
from keras_bn.diagnosis.rules import RULES, SCHEMA_VERSION, SEVERITIES, WARNING
from keras_bn.moments import Moments
from keras_bn.pages import plain
from keras_bn.pages.display import Displayed, Section, opened, render, write
from keras_bn.pages.origin import Origin
from keras_bn.pages.plain import escaped, number


@dataclass(repr=False)
class Report(Displayed):
    """What `keras_bn.diagnose` found.

    Args:
        record: the `ModelRecord`, with all the numbers.
        findings: a list of `Finding` (`kind`, `layer`, `severity`, `message`,
            `remedy`), most severe first.
        ignored: those that `ignore` has left out.
        origin: an `Origin`: what was diagnosed, when, and with which versions.
        source: the model and the data, for `fix`.
    """

    record: ModelRecord
    findings: list[Finding]
    ignored: list[Finding] = field(default_factory=list)
    origin: Origin | None = field(default=None, repr=False, compare=False)
    source: Source | None = field(default=None, repr=False, compare=False)

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
        return next(layer for layer in self.record.layers if layer.layer == path)

    def _in_a_line(self):
        return f"{escaped(self.record.model)}: {html.verdict(self)}"

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
            "layers": [_layer_dict(layer) for layer in record.layers],
            "not_called": list(record.not_called),
            "findings": [finding.to_dict() for finding in self.findings],
            "ignored": [finding.to_dict() for finding in self.ignored],
            "not_looked_for": self.not_looked_for,
        }

    def to_dataframe(self) -> Any:
        """The layers as a `pandas.DataFrame`, which needs pandas.

        Returns:
            A row for each layer, by its path, with the numbers of `to_dict` and the
            kinds of its findings.

        Raises:
            ModuleNotFoundError: without pandas.
        """
        import pandas

        frame = pandas.json_normalize(self.to_dict()["layers"], sep="_")
        kinds = [
            ", ".join(f.kind for f in self.findings if f.layer == path)
            for path in frame["layer"]
        ]
        return frame.assign(findings=kinds).set_index("layer")

    def to_html(self, int8: Section | None = None) -> str:
        """The report as one page of HTML that loads nothing.

        Args:
            int8: what `keras_bn.export_int8` has returned for the model; its layers
                then follow those of the diagnosis.

        Returns:
            A string.

        Raises:
            TypeError: if `int8` is something else.
        """
        return render("page.html", self._content(int8))

    def write_html(
        self, path: str | os.PathLike[str], int8: Section | None = None
    ) -> None:
        """Write the page to a file, over an existing one.

        Args:
            path: of the file.
            int8: as in `to_html`.

        Raises:
            OSError: if it cannot be written.
            TypeError: as `to_html`.
        """
        write(path, self.to_html(int8))

    def open(self, int8: Section | None = None) -> Path:
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
        return opened(self.to_html(int8), self.record.model)

    def _content(self, int8=None):
        if int8 is not None and not isinstance(int8, Section):
            raise TypeError(
                "`int8` must be what keras_bn.export_int8 returns. Received: "
                f"int8={int8!r}"
            )
        return html.report(self, int8 and int8.section())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw each layer's drift over its channels, and its output gap.

        Args:
            path: where to save the figure, if anywhere.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ValueError: for a report without data, which has no drift.
        """
        if not self.record.has_data:
            raise ValueError(
                "The figure shows the drift from the data, and this report is without: "
                "keras_bn.diagnose(model, data).plot()"
            )
        figure = plots.draw(self.record, self.findings)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def fix(
        self,
        data: Any = None,
        *,
        steps: int | None = None,
        batch_size: int | None = None,
    ) -> "Fixed":
        """Apply the remedies that change statistics only, then diagnose again.

        The same as `keras_bn.fix(model, report, data)` with what was diagnosed.

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
        from keras_bn.diagnosis.diagnose import fix  # which imports this module

        if self.source is None:
            raise ValueError(
                "This report does not hold its model: take the one that "
                "`keras_bn.diagnose` returns."
            )
        return fix(self.source.model, self, data, steps=steps, batch_size=batch_size)


@dataclass(repr=False)
class Comparison(Displayed):
    """Two reports side by side.

    Args:
        before, after: the reports.
    """

    before: Report
    after: Report

    @property
    def gone(self) -> list[Finding]:
        """The findings before that are not there after."""
        return _without(self.before, self.after)

    @property
    def new(self) -> list[Finding]:
        """The findings after that were not there before."""
        return _without(self.after, self.before)

    @property
    def remaining(self) -> list[Finding]:
        """The findings after that were there before."""
        new = self.new
        return [finding for finding in self.after.findings if finding not in new]

    @property
    def worse(self) -> list[str]:
        """What is worse after, of loss and accuracy in inference, in words.

        Numbers that are the same as shown are the same.
        """
        words = []
        for name, form, sign in (("loss", "{:.3g}", 1), ("accuracy", "{:.1%}", -1)):
            pairs = [getattr(r.record, name) for r in (self.before, self.after)]
            if None in pairs:
                continue
            first, second = (pair[0] for pair in pairs)
            shown = form.format(first), form.format(second)
            worse = not sign * second <= sign * first and not math.isnan(first)
            if worse and shown[0] != shown[1]:
                words.append(f"{name} in inference worse: {' to '.join(shown)}")
        return words

    @property
    def layers(self) -> list[tuple[str, LayerRecord | None, LayerRecord | None]]:
        """Triples of a path, and the `LayerRecord` before and after, or None."""
        first = {layer.layer: layer for layer in self.before.record.layers}
        second = {layer.layer: layer for layer in self.after.record.layers}
        return [(path, first.get(path), second.get(path)) for path in first | second]

    def _in_a_line(self):
        names = dict.fromkeys(r.record.model for r in (self.before, self.after))
        return f"{' and '.join(map(escaped, names))}: {html.changes(self)}"

    def __str__(self) -> str:
        before, after = self.before.record, self.after.record
        names = dict.fromkeys((before.model, after.model))
        lines = [f"{' and '.join(map(escaped, names))}: before and after"]
        for name, first, second in (
            ("loss", before.loss, after.loss),
            ("accuracy", before.accuracy, after.accuracy),
        ):
            if first is not None and second is not None:
                lines.append(
                    f"{name} in inference {first[0]:.4g}, then {second[0]:.4g}"
                )
        lines += [f"Note: {words}" for words in self.worse]
        if before.has_data or after.has_data:
            rows = [[path, *_cells(*pair)] for path, *pair in self.layers]
            lines += ["", *plain.lines(plain.table(_HEADER, rows))]
        for title, findings in (
            ("Gone", self.gone),
            ("New", self.new),
            ("Remaining", self.remaining),
        ):
            if findings:
                lines += ["", f"{title}:", *map(text.heading, text.grouped(findings))]
        if not self.gone and not self.new:
            lines += ["", "The findings are the same."]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Both reports and what differs, in plain types, ready for JSON."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "gone": [finding.to_dict() for finding in self.gone],
            "new": [finding.to_dict() for finding in self.new],
            "remaining": [finding.to_dict() for finding in self.remaining],
        }

    def _content(self):
        return html.comparison(self)


_NAMED = 10  # the layers of longer lists are named where each is shown


@dataclass(repr=False)
class Fixed(Comparison):
    """What `keras_bn.fix` did.

    Args:
        before, after: the reports.
        recalibrated: the `Moments` of the data that are now the statistics of a layer,
            by its path.
    """

    recalibrated: dict[str, Moments] = field(default_factory=dict)

    @property
    def done(self) -> str:
        """What was done, in a sentence."""
        if not self.recalibrated:
            return "Nothing was changed: no finding is fixed by recalibration."
        count = len(self.recalibrated)
        layers = "layers" if count > 1 else "layer"
        if count > _NAMED:
            return f"Recalibrated {count} {layers}."
        names = ", ".join(map(escaped, self.recalibrated))
        return f"Recalibrated {count} {layers}: {names}."

    def __str__(self) -> str:
        return f"{self.done}\n\n{super().__str__()}"

    def to_dict(self) -> dict[str, Any]:
        """As of a comparison, with the paths of the layers recalibrated."""
        return {"recalibrated": list(self.recalibrated), **super().to_dict()}


def _layer_dict(layer):
    return {
        "layer": layer.layer,
        "channels": int(layer.moving_mean.size),
        "momentum": layer.momentum,
        "epsilon": layer.epsilon,
        "frozen": layer.frozen,
        "inference_mode": layer.inference_mode,
        **_measured_dict(layer),
    }


def _measured_dict(layer):
    """What data has shown of a layer; None for each without."""
    keys = "elements_per_batch", "elements", "mean_drift", "log_variance_ratio"
    if not isinstance(layer, MeasuredLayer):
        return dict.fromkeys((*keys, "output_gap"))
    drift = layer.drift
    ratios = 2 * _log(drift.ratio), 2 * _log(drift.worst_ratio)
    values = (
        layer.elements,
        int(layer.data.count.min()),
        _extremes(drift.mean, drift.worst_mean),
        _extremes(*ratios),
    )
    return {**dict(zip(keys, values, strict=True)), "output_gap": number(layer.gap)}


def _extremes(median, worst):
    return {"median": number(median), "worst": number(worst)}


def _log(value):
    return math.log(value) if value > 0 else math.nan


def _both_ways(pair):
    return pair and dict(zip(("inference", "training"), map(number, pair), strict=True))


_HEADER = (
    "worst channel\nlayer",
    "mean off, in std\nbefore",
    "\nafter",
    "std ratio\nbefore",
    "\nafter",
    "output gap\nbefore",
    "\nafter",
)


def _cells(before, after):
    """The numbers of a layer, in the columns of `_HEADER`."""

    def pair(value):
        for layer in before, after:
            if not isinstance(layer, MeasuredLayer):
                yield "-"
            else:
                yield f"{value(layer):.2f}"

    yield from pair(lambda layer: layer.drift.worst_mean)
    yield from pair(lambda layer: layer.drift.worst_ratio)
    yield from pair(lambda layer: layer.gap)


def _without(report, other):
    """The findings of a report that another one has not."""
    there = {_key(finding, other) for finding in other.findings}
    return [f for f in report.findings if _key(f, report) not in there]


def _key(finding, report):
    """The same for the same finding in two reports; models may have other names."""
    own = finding.layer == report.record.model
    return finding.kind, None if own else finding.layer
