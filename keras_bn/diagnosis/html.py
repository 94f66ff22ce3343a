"""A report in HTML: a page for screens of any size, and the output of a notebook.

Each layer is a row with a dot for each channel; on a narrow screen, a card.
"""

import zlib
from html import escape
from itertools import groupby

import numpy as np

from keras_bn.diagnosis import drawings, text
from keras_bn.diagnosis.findings import WORST_MEAN_DRIFT, WORST_STDDEV_RATIO
from keras_bn.diagnosis.plots import mean_limit, ratio_limit
from keras_bn.diagnosis.rules import SEVERITIES
from keras_bn.pages import display

_MEAN, _RATIO, GAP = (
    "Moving mean, off the data's by",
    "Moving std / the data's",
    "Output gap",
)


def page(report, int8=None):
    """The report as one self-contained page.

    Args:
        report: a `Report`.
        int8: an `Int8Report` whose layers to show as well, or None.

    Returns:
        A string of HTML.
    """
    body = "\n".join([_body(report), *([int8.section()] if int8 else [])])
    return display.page(f"{report.record.model}: {verdict(report)}", body)


def fragment(report):
    """The report to display in a notebook; a string of HTML."""
    return display.fragment(_body(report))


def _body(report):
    name = _name(report)
    parts = _head(report), _numbers(report.record), _findings(report, name)
    return "\n".join([*parts, _layers(report, name)])


def _name(report):
    """What the names of the rows begin with: a notebook may show several reports."""
    return f"bn-{zlib.crc32(str(report).encode()):08x}"


def verdict(report):
    """How many findings there are of each severity, in words."""
    counts = {
        s: len([f for f in report.findings if f.severity == s]) for s in SEVERITIES
    }
    said = [f"{n} {s}{'s' * (n > 1)}" for s, n in counts.items() if n]
    nothing = "healthy" if report.record.has_data else "nothing found without data"
    return ", ".join(said) or nothing


def worst(findings):
    """The first of the severities among findings; "healthy" without any."""
    present = {finding.severity for finding in findings}
    return next((s for s in SEVERITIES if s in present), "healthy")


def _head(report):
    record = report.record
    batches = f"{record.batches:,} {'batches' if record.batches > 1 else 'batch'}"
    data = f"{record.samples:,} samples in {batches}" if record.has_data else "no data"
    steps = "" if record.steps is None else f", trained for {record.steps:,} steps"
    return f"""<header class="{worst(report.findings)}">
<p class="kicker">Batch normalization, diagnosed</p>
<h1>{escape(record.model)}</h1>
<p class="verdict">{verdict(report)}</p>
<p>{data}{steps}</p>
</header>"""


def _numbers(record):
    """Loss and accuracy in inference and with the statistics of each batch."""
    if not record.has_data:
        return ""
    tiles = [
        tile(
            name,
            ("in inference", form.format(pair[0])),
            ("with the statistics of each batch", form.format(pair[1])),
        )
        for name, form, pair in (
            ("Loss", "{:.3g}", record.loss),
            ("Accuracy", "{:.1%}", record.accuracy),
        )
        if pair is not None
    ]
    what = "between the two, relative to the spread of the output"
    tiles.append(tile(GAP, (what, f"{record.gap:.2f}")))
    return f'<section class="numbers">{"".join(tiles)}</section>'


def tile(title, *numbers):
    """A few numbers under a title: pairs of what a number is and the number."""
    items = "".join(f"<dt>{what}</dt><dd>{number}</dd>" for what, number in numbers)
    return f"<div><h2>{title}</h2><dl>{items}</dl></div>"


def _findings(report, name):
    notes = [
        f"<p>{escape(line)}</p>"
        for said, line in (
            (report.ignored, f"Ignored: {text.kinds(report.ignored)}"),
            (
                report.not_looked_for,
                "Not looked for, since that needs data: "
                + ", ".join(report.not_looked_for),
            ),
        )
        if said
    ]
    if report.findings:
        shown = cards(report.findings, report.record, name)
    else:
        what = "the moving statistics are those of the data"
        nothing = f": {what}." if report.record.has_data else "."
        shown = f'<p class="finding healthy">No problems found{nothing}</p>'
    below = f'<div class="legend">{"".join(notes)}</div>' if notes else ""
    return f"<section><h2>Findings</h2>\n{shown}\n{below}</section>"


def cards(findings, record, name):
    """Findings as cards, those of one kind together.

    Args:
        findings: a list of `Finding`.
        record: the `ModelRecord` whose layers they are in.
        name: what the names of the rows of the layers begin with; None for no links.
    """
    groups = groupby(findings, key=lambda f: (f.severity, f.kind))
    return "\n".join(_card(list(group), record, name) for _, group in groups)


def _card(same, record, name):
    """The findings of one kind: open if they are few, folded if they are many."""
    first = same[0]
    remedies = {finding.remedy for finding in same}
    items = "".join(
        f"<li>{_link(finding.layer, record, name)}: {escape(finding.message)}"
        + (f"<pre>{escape(finding.remedy)}</pre>" if len(remedies) > 1 else "")
        + "</li>"
        for finding in same
    )
    if len(same) == 1:
        where = f" in {_link(first.layer, record, name)}"
        body = f"<p>{escape(first.message)}</p>"
    else:
        where = f" in {len(same)} layers"
        opened = " open" if len(same) <= 3 else ""
        inner = f"<summary>Which, and how</summary><ul>{items}</ul>"
        body = f"<details{opened}>{inner}</details>"
    remedy = f"<pre>{escape(first.remedy)}</pre>" if len(remedies) == 1 else ""
    return (
        f'<article class="finding {first.severity}"><h3>'
        f'<span class="tag">{first.severity}</span> {first.kind}{where} '
        f'<span class="rule">{first.rule}</span></h3>{body}{remedy}</article>'
    )


def _link(layer, record, name):
    for row, each in enumerate(record.layers):
        if name is not None and each.layer == layer:
            return f'<a href="#{name}-{row}">{escape(layer)}</a>'
    return escape(layer)


def _layers(report, name):
    layers = report.record.layers
    columns = Columns(layers)
    rows = []
    for row, layer in enumerate(layers):
        mine = [f for f in report.findings if f.layer == layer.layer]
        nothing = "healthy" if report.record.has_data else "nothing found"
        cells = [
            f"{escape(layer.layer)}<small>{about(layer)}</small>",
            *columns.cells([layer], row),
            display.cell(
                "Findings", tags(mine) or f'<span class="tag">{nothing}</span>'
            ),
        ]
        rows.append((f'id="{name}-{row}" class="{worst(mine)}"', cells))
    not_called = ""
    if report.record.not_called:
        not_called = f"<p>Not called: {escape(', '.join(report.record.not_called))}</p>"
    return layers_section(columns, rows) + not_called


_LEGEND = """<p class="legend">Each dot is a channel, each bar the median of a layer; a
triangle is off the scale. In the green band a channel counts as healthy. The gap is the
difference between a layer's outputs in training and in inference, relative to their
spread.</p>"""


def layers_section(columns, rows):
    """The table of the layers with its heading and legend.

    Args:
        columns: the `Columns` of the drawings.
        rows: as for `display.table`.
    """
    legend, drawn = "", ""
    if columns.drawn:
        drawn = " drawn"
        legend = _LEGEND
    table = display.table(["Layer", *columns.titles, "Findings"], rows)
    return f"""<section>
<h2>Layers, in the order the data passes them</h2>
{legend}
<div class="rows layers{drawn}">
{table}
</div>
</section>"""


class Columns:
    """The drawings of layers, all on the same axes.

    Args:
        layers: every `LayerRecord` to draw; those without data have no drawing.

    Attributes:
        drawn: whether there is anything to draw.
        titles: of the columns, in HTML.
    """

    def __init__(self, layers):
        with_data = [layer for layer in layers if layer.data is not None]
        self.drawn = bool(with_data)
        self.titles = []
        if not self.drawn:
            return
        self._of_mean = mean_limit([layer.mean_drift for layer in with_data])
        self._of_ratio = ratio_limit([_logs(layer) for layer in with_data])
        self._means = f"−{self._of_mean:.2g}", "0", f"{self._of_mean:.2g} std"
        widest = f"{2**self._of_ratio:.2g}"
        self._ratios = f"1/{widest}", "1", widest
        self.titles = [
            _MEAN + drawings.scale(*self._means),
            _RATIO + drawings.scale(*self._ratios),
            GAP + drawings.scale("0", "", f"{drawings.FULL_GAP:g} or more"),
        ]

    def cells(self, layers, seed, mark="{}"):
        """The cells of a row: each drawing once for each of the layers.

        Args:
            layers: a `LayerRecord` and its likes, which share the row.
            seed: of the scatter of the dots.
            mark: how to set a drawing, with a `{}` for it; or one for each layer.
        """
        if not self.drawn:
            return []
        marks = [mark] * len(layers) if isinstance(mark, str) else mark
        return [
            display.cell(
                label,
                "".join(
                    mark.format(draw(layer, seed))
                    for mark, layer in zip(marks, layers, strict=True)
                ),
            )
            for label, draw in (
                (f"{_MEAN} ({' … '.join(self._means)})", self._mean),
                (f"{_RATIO} ({' … '.join(self._ratios)})", self._ratio),
                (GAP, self._gap),
            )
        ]

    def _mean(self, layer, seed):
        if layer is None or layer.data is None:
            return _NOTHING
        drift, values = layer.drift, layer.mean_drift
        return drawings.strip(
            values, self._of_mean, WORST_MEAN_DRIFT, seed
        ) + display.small(drawings.said(values, drift.mean, drift.worst_mean, " std"))

    def _ratio(self, layer, seed):
        if layer is None or layer.data is None:
            return _NOTHING
        drift, logs = layer.drift, _logs(layer)
        healthy = np.log2(WORST_STDDEV_RATIO)
        return drawings.strip(logs, self._of_ratio, healthy, seed) + display.small(
            drawings.said(logs, drift.ratio, drift.worst_ratio)
        )

    def _gap(self, layer, seed):
        if layer is None or layer.data is None:
            return _NOTHING
        return display.bar(layer.gap, drawings.FULL_GAP) + display.small(
            f"{layer.gap:.2f}"
        )


_NOTHING = "<small>no data</small>"


def _logs(layer):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(layer.stddev_ratio)


def about(layer):
    """The settings of a layer, in words."""
    size = layer.moving_mean.size
    momentum = "mean" if layer.momentum is None else f"{layer.momentum:g}"
    words = [f"{size:,} channel{'s' * (size > 1)}"]
    if layer.elements is not None:
        words.append(f"{layer.elements:,.0f} elements per batch")
    return ", ".join([*words, f"momentum {momentum}", *["frozen"] * layer.frozen])


def tags(findings, element="span"):
    """The kinds of findings as tags."""
    return " ".join(
        f'<{element} class="tag {finding.severity}">{finding.kind}</{element}>'
        for finding in findings
    )
