"""Two reports side by side: before and after."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keras_bn.diagnosis import text
from keras_bn.diagnosis.findings import Finding
from keras_bn.diagnosis.records import LayerRecord
from keras_bn.moments import Moments
from keras_bn.pages.plain import table


def compare(before: Any, after: Any) -> "Comparison":
    """Two reports side by side: what went, what came, and the drift of both.

    Args:
        before, after: reports of `keras_bn.diagnose`, of one model at two times or of
            two models with layers of the same paths.

    Returns:
        A `Comparison`: `print` shows it, a notebook displays it, `open()` opens it in a
        browser.

    Raises:
        TypeError: if one is no report.
        ValueError: if they have no layer in common.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), keras_bn.BatchNormalization(name="bn")], name="model"
    ... )
    >>> x = np.random.default_rng(0).normal(5.0, 1.0, (200, 2))
    >>> before = keras_bn.diagnose(model, x)
    >>> _ = keras_bn.recalibrate(model, x, verbose=0)
    >>> comparison = keras_bn.compare(before, keras_bn.diagnose(model, x))
    >>> [finding.kind for finding in comparison.gone]
    ['never-updated', 'train-inference-gap']
    """
    for name, report in (("before", before), ("after", after)):
        if not hasattr(report, "record"):
            raise TypeError(
                f"`{name}` must be a report of keras_bn.diagnose. Received: {report!r}"
            )
    comparison = Comparison(before, after)
    if not any(None not in pair for _, *pair in comparison.layers):
        raise ValueError(
            "The reports have no layer in common. Received: "
            f"{_paths(before)} and {_paths(after)}"
        )
    return comparison


@dataclass
class Comparison:
    """Two reports side by side.

    Args:
        before, after: the reports.
    """

    before: Any  # `report.Report`, which imports this module
    after: Any

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
    def layers(self) -> list[tuple[str, LayerRecord | None, LayerRecord | None]]:
        """Triples of a path, and the `LayerRecord` before and after, or None."""
        first = {each.layer: each for each in self.before.record.layers}
        second = {each.layer: each for each in self.after.record.layers}
        return [(path, first.get(path), second.get(path)) for path in first | second]

    def __str__(self) -> str:
        before, after = self.before.record, self.after.record
        names = dict.fromkeys((before.model, after.model))
        lines = [f"{' and '.join(names)}: before and after"]
        for name, first, second in (
            ("loss", before.loss, after.loss),
            ("accuracy", before.accuracy, after.accuracy),
        ):
            if first is not None and second is not None:
                lines.append(
                    f"{name} in inference {first[0]:.4g}, then {second[0]:.4g}"
                )
        if before.has_data or after.has_data:
            rows = [[path, *_cells(*pair)] for path, *pair in self.layers]
            lines += ["", *table(_HEADER, rows)]
        for title, found in (
            ("Gone", self.gone),
            ("New", self.new),
            ("Remaining", self.remaining),
        ):
            if found:
                lines += ["", f"{title}:", *map(text.heading, found)]
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

    def to_html(self) -> str:
        """The comparison as one page of HTML that loads nothing; a string."""
        from keras_bn.diagnosis.comparison_html import page

        return page(self)

    def _repr_html_(self):
        from keras_bn.diagnosis.comparison_html import fragment

        return fragment(self)

    def open(self) -> Path:
        """Show the page in the browser, as `Report.open` does."""
        from keras_bn.pages.display import opened

        return opened(self.to_html(), f"{self.after.record.model}-compared")


@dataclass
class Fixed(Comparison):
    """What `Report.fix` did.

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
        return f"Recalibrated {count} {layers}: {', '.join(self.recalibrated)}."

    def __str__(self) -> str:
        return f"{self.done}\n\n{super().__str__()}"

    def to_dict(self) -> dict[str, Any]:
        """As of a comparison, with the paths of the layers recalibrated."""
        return {"recalibrated": list(self.recalibrated), **super().to_dict()}


_HEADER = (
    ("worst channel", "mean off, in std", "", "std ratio", "", "output gap", ""),
    ("layer", "before", "after", "before", "after", "before", "after"),
)


def _cells(before, after):
    """The numbers of a layer, in the columns of `_HEADER`."""

    def pair(value):
        for layer in before, after:
            if layer is None or layer.data is None:
                yield "-"
            else:
                yield f"{value(layer):.2f}"

    yield from pair(lambda layer: layer.drift.worst_mean)
    yield from pair(lambda layer: layer.drift.worst_ratio)
    yield from pair(lambda layer: layer.gap)


def _without(report, other):
    """The findings of a report that another one has not."""
    there = {_key(finding, other) for finding in other.findings}
    return [each for each in report.findings if _key(each, report) not in there]


def _key(finding, report):
    """The same for the same finding in two reports; models may have other names."""
    own = finding.layer == report.record.model
    return finding.kind, None if own else finding.layer


def _paths(report):
    return ", ".join(each.layer for each in report.record.layers)
