"""What the pages of a diagnosis and a comparison show; `pages/templates` has the HTML.

Each layer is a row with a dot for each channel; on a narrow screen, a card.
"""

import zlib
from typing import NamedTuple

import numpy as np

from keras_bn.diagnosis import drawings, text
from keras_bn.diagnosis.findings import WORST_MEAN_DRIFT, WORST_STDDEV_RATIO
from keras_bn.diagnosis.plots import mean_limit, ratio_limit
from keras_bn.diagnosis.records import MeasuredLayer
from keras_bn.diagnosis.rules import RULES, SEVERITIES
from keras_bn.pages.display import Content

_GAP = "Output gap"


def report(shown, int8=None):
    """The content of the page of a report.

    Args:
        shown: a `Report`.
        int8: the `Content` of a section to add at the end, or None.
    """
    record = shown.record
    rows = [
        Row(
            layer.layer,
            _about(layer),
            [(layer, "", [f for f in shown.findings if f.layer == layer.layer])],
            nothing="healthy" if record.has_data else "nothing found",
        )
        for layer in record.layers
    ]
    table = Table(_name(shown), rows)
    context = {
        "record": record,
        "tone": worst(shown.findings),
        "verdict": verdict(shown),
        "data": _data(record),
        "origin": shown.origin.lines() if shown.origin else [],
        "tiles": _numbers(record),
        "groups": text.grouped(shown.findings),
        "notes": text.omissions(shown),
        "table": table,
        "ids": table.ids,
        "rules": _rules(shown.findings),
        "full_gap": drawings.FULL_GAP,
        "section": None,
    }
    if int8 is not None:
        context |= {**int8.context, "section": int8.template}
    return Content(f"{record.model}: {verdict(shown)}", "report.html", context)


def comparison(shown):
    """The content of the page of a `Comparison`."""
    before, after = shown.before, shown.after
    rows = []
    for path, *layers in shown.layers:
        findings = [[f for f in r.findings if f.layer == path] for r in (before, after)]
        rows.append(
            Row(
                path,
                _about(layers[1] or layers[0]),
                list(zip(layers, ("before", "after"), findings, strict=True)),
                gone=[f for f in findings[0] if f in shown.gone],
                nothing="healthy",
            )
        )
    table = Table(_name(shown), rows)
    name = " and ".join(dict.fromkeys((before.record.model, after.record.model)))
    origins = [r.origin.lines() for r in (before, after) if r.origin]
    context = {
        "name": name,
        "tone": "warning" if _is_green_though_worse(shown) else worst(after.findings),
        "verdict": changes(shown),
        "done": getattr(shown, "done", None),
        "origin": list(dict.fromkeys(line for lines in origins for line in lines)),
        "tiles": _both_numbers(before.record, after.record),
        "sections": [
            ("New", text.grouped(shown.new)),
            ("Remaining", text.grouped(shown.remaining)),
        ],
        "gone": text.grouped(shown.gone),
        "table": table,
        "ids": table.ids,
        "rules": _rules([*before.findings, *after.findings]),
        "full_gap": drawings.FULL_GAP,
    }
    return Content(name, "comparison.html", context)


def verdict(report):
    """How many findings there are of each severity, in words."""
    counts = {
        s: len([f for f in report.findings if f.severity == s]) for s in SEVERITIES
    }
    words = [f"{n} {s}{'s' * (n > 1)}" for s, n in counts.items() if n]
    nothing = "healthy" if report.record.has_data else "nothing found without data"
    return ", ".join(words) or nothing


def worst(findings):
    """The first of the severities among findings; "healthy" without any."""
    present = {finding.severity for finding in findings}
    return next((s for s in SEVERITIES if s in present), "healthy")


class Axis(NamedTuple):
    """A column of drawings, all on the same axis.

    Args:
        column: the field of `Measured` that it shows.
        title: of the column.
        scale: the numbers on the axis: left, middle, right.
    """

    column: str
    title: str
    scale: tuple[str, str, str]

    @property
    def label(self):
        """The title of a drawing where columns have none, on a narrow screen."""
        between = " … ".join(self.scale)
        return self.title if self.column == "gap" else f"{self.title} ({between})"


class Measured(NamedTuple):
    """What the data shows of a layer: two drawings and a number."""

    mean: drawings.Strip
    ratio: drawings.Strip
    gap: float


class Side(NamedTuple):
    """A layer in one report of a page.

    Args:
        when: "before" or "after"; empty if there is one report.
        tone: the worst severity of its findings.
        measured: a `Measured`, or None without data.
    """

    when: str
    tone: str
    measured: Measured | None


class Row:
    """A layer of a page.

    Args:
        layer: its path.
        about: its settings, in words.
        reports: triples of its `LayerRecord` or None, when, and its findings; the last
            is what is true now.
        gone: its findings that are not true any more.
        nothing: what to say if there are no findings.
    """

    def __init__(self, layer, about, reports, gone=(), nothing="healthy"):
        self.layer, self.about, self.gone, self.nothing = layer, about, gone, nothing
        self.reports = reports
        self.findings = reports[-1][2]
        self.tone = worst(self.findings)
        self.sides: list[Side] = []
        self.ranks: dict[str, int] = {}


class Table:
    """The rows of the layers with their drawings, all on the same axes.

    Args:
        name: what the names of its elements begin with: a notebook may show several.
        rows: a list of `Row`.

    Attributes:
        axes: the columns of drawings; none without data.
        sorts: pairs of a key and how it sorts, in words.
        ids: the names of the rows, by the paths of their layers.
    """

    def __init__(self, name, rows):
        self.name, self.rows = name, rows
        self.ids = {row.layer: f"{name}-{i}" for i, row in enumerate(rows)}
        layers = [
            layer
            for row in rows
            for layer, *_ in row.reports
            if isinstance(layer, MeasuredLayer)
        ]
        self.axes: list[Axis] = []
        self.sorts = [("order", "order in the model"), ("severity", "severity")]
        _rank(rows, "severity", lambda row: _severity(row.tone))
        if layers:
            self._mean = mean_limit([layer.mean_drift for layer in layers])
            self._ratio = ratio_limit([_logs(layer) for layer in layers])
            self.axes = self._columns()
            self.sorts += [("mean", "mean"), ("ratio", "deviation"), ("gap", "gap")]
            for key, value in _MEASURES.items():
                _rank(rows, key, lambda row, value=value: -_last(row, value))
        for seed, row in enumerate(rows):
            row.sides = [
                Side(when, worst(findings), self._measured(layer, seed))
                for layer, when, findings in row.reports
            ]

    def _columns(self):
        widest = f"{2**self._ratio:.2g}"
        return [
            Axis(
                "mean",
                "Moving mean, off the data's by",
                (f"−{self._mean:.2g}", "0", f"{self._mean:.2g} std"),
            ),
            Axis("ratio", "Moving std / the data's", (f"1/{widest}", "1", widest)),
            Axis("gap", _GAP, ("0", "", f"{drawings.FULL_GAP:g} or more")),
        ]

    def _measured(self, layer, seed):
        if not isinstance(layer, MeasuredLayer):
            return None
        drift, healthy = layer.drift, np.log2(WORST_STDDEV_RATIO)
        of_mean = f"{_typically(drift.mean, drift.worst_mean)} std"
        of_ratio = _typically(drift.ratio, drift.worst_ratio)
        return Measured(
            drawings.strip(
                layer.mean_drift, self._mean, WORST_MEAN_DRIFT, seed, of_mean
            ),
            drawings.strip(_logs(layer), self._ratio, healthy, seed, of_ratio),
            layer.gap,
        )


# What layers are sorted by: the worst channel, or the gap.
_MEASURES = {
    "mean": lambda layer: layer.drift.worst_mean,
    "ratio": lambda layer: np.abs(_logs(layer)).max(),
    "gap": lambda layer: layer.gap,
}


def _rank(rows, key, value):
    """Note the place of each row in the order of a value, NaN first."""
    values = {id(row): value(row) for row in rows}
    ordered = sorted(rows, key=lambda row: np.nan_to_num(values[id(row)], nan=-np.inf))
    for rank, row in enumerate(ordered):
        row.ranks[key] = rank


def _last(row, value):
    """A value of the last of its reports that has data."""
    layers = [layer for layer, *_ in row.reports if isinstance(layer, MeasuredLayer)]
    return value(layers[-1]) if layers else -np.inf


def _severity(tone):
    return [*SEVERITIES, "healthy"].index(tone)


def _typically(typical, worst):
    return f"typically {typical:.2f}, at worst {worst:.2f}"


def _logs(layer):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(layer.stddev_ratio)


def _name(shown):
    return f"bn-{zlib.crc32(str(shown).encode()):08x}"


def _data(record):
    steps = "" if record.steps is None else f", trained for {record.steps:,} steps"
    if not record.has_data:
        return f"no data{steps}"
    batches = f"{record.batches:,} {'batches' if record.batches > 1 else 'batch'}"
    return f"{record.samples:,} samples in {batches}{steps}"


def _numbers(record):
    """Loss and accuracy in inference and with the statistics of each batch."""
    if not record.has_data:
        return []
    tiles = [
        (
            name,
            [
                ("in inference", form.format(pair[0])),
                ("with the statistics of each batch", form.format(pair[1])),
            ],
        )
        for name, form, pair in (
            ("Loss", "{:.3g}", record.loss),
            ("Accuracy", "{:.1%}", record.accuracy),
        )
        if pair is not None
    ]
    what = "between the two, relative to the spread of the output"
    return [*tiles, (_GAP, [(what, f"{record.gap:.2f}")])]


def _both_numbers(before, after):
    """Loss, accuracy and gap before and after."""
    pairs = [
        (f"{name} in inference", form, first and first[0], second and second[0])
        for name, form, first, second in (
            ("Loss", "{:.3g}", before.loss, after.loss),
            ("Accuracy", "{:.1%}", before.accuracy, after.accuracy),
        )
    ]
    pairs.append((_GAP, "{:.2f}", before.gap, after.gap))
    return [
        (name, [("before", form.format(first)), ("after", form.format(second))])
        for name, form, first, second in pairs
        if first is not None and second is not None
    ]


def changes(shown):
    """How many findings went, came and stayed, and what is worse, in words."""
    counts = (("gone", shown.gone), ("new", shown.new), ("remaining", shown.remaining))
    words = [f"{len(findings)} {what}" for what, findings in counts if findings]
    return "; ".join([", ".join(words) or "no findings before and after", *shown.worse])


def _is_green_though_worse(shown):
    return bool(shown.worse) and worst(shown.after.findings) in ("note", "healthy")


def _rules(findings):
    """The rules of some findings, in the order of their ids."""
    kinds = {finding.kind for finding in findings}
    return [rule for rule in RULES.values() if rule.kind in kinds]


def _about(layer):
    """The settings of a layer, in words."""
    size = layer.moving_mean.size
    momentum = "mean" if layer.momentum is None else f"{layer.momentum:g}"
    words = [f"{size:,} channel{'s' * (size > 1)}"]
    if isinstance(layer, MeasuredLayer):
        words.append(f"{layer.elements:,.0f} elements per batch")
    return ", ".join([*words, f"momentum {momentum}", *["frozen"] * layer.frozen])
