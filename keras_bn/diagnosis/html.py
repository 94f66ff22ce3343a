"""The page of a diagnosis: one HTML file that loads nothing, for screens of any size.

Each layer is a row with a dot for each channel; on a narrow screen, a card.
"""

from html import escape
from importlib.resources import files
from itertools import groupby

import numpy as np

from keras_bn.diagnosis.findings import (
    SEVERITIES,
    WORST_MEAN_DRIFT,
    WORST_STDDEV_RATIO,
)
from keras_bn.diagnosis.plots import mean_limit, ratio_limit
from keras_bn.version import __version__

# At most this many channels of a layer are drawn, always with the outermost.
_DOTS = 256
# The drawing of a layer, in its own units; it is scaled to its column.
_WIDTH, _HEIGHT, _MARGIN = 240, 34, 8
_MEAN, _RATIO = "Moving mean, off the data's by", "Moving std / the data's"
# The gap that fills the bar.
_FULL_GAP = 1.0


def page(record, findings):
    """The diagnosis as one self-contained page.

    Args:
        record: a `ModelRecord`.
        findings: its list of `Finding`.

    Returns:
        A string of HTML.
    """
    css = files("keras_bn.diagnosis").joinpath("page.css").read_text(encoding="utf-8")
    title = escape(f"{record.model}: {_verdict(findings)}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<main>
{_head(record, findings)}
{_numbers(record)}
{_findings(record, findings)}
{_layers(record, findings)}
</main>
<footer>keras_bn {__version__}</footer>
</body>
</html>
"""


def _verdict(findings):
    counts = {s: sum(f.severity == s for f in findings) for s in SEVERITIES}
    said = [f"{n} {s}{'s' * (n > 1)}" for s, n in counts.items() if n]
    return ", ".join(said) or "healthy"


def _worst(findings):
    """The first of the severities among findings; "healthy" without any."""
    present = {finding.severity for finding in findings}
    return next((s for s in SEVERITIES if s in present), "healthy")


def _head(record, findings):
    batches = f"{record.batches:,} {'batches' if record.batches > 1 else 'batch'}"
    steps = "" if record.steps is None else f", trained for {record.steps:,} steps"
    return f"""<header class="{_worst(findings)}">
<p class="kicker">Batch normalization, diagnosed</p>
<h1>{escape(record.model)}</h1>
<p class="verdict">{_verdict(findings)}</p>
<p>{record.samples:,} samples in {batches}{steps}</p>
</header>"""


def _numbers(record):
    """Loss and accuracy in inference and with the statistics of each batch."""
    tiles = [
        (name, form.format(pair[0]), form.format(pair[1]))
        for name, form, pair in (
            ("Loss", "{:.3g}", record.loss),
            ("Accuracy", "{:.1%}", record.accuracy),
        )
        if pair is not None
    ]
    text = "".join(
        f"<div><h2>{name}</h2><dl><dt>in inference</dt><dd>{inference}</dd>"
        f"<dt>with the statistics of each batch</dt><dd>{training}</dd></dl></div>"
        for name, inference, training in tiles
    )
    return (
        f'<section class="numbers">{text}'
        "<div><h2>Output gap</h2><dl><dt>between the two, relative to the spread of "
        f"the output</dt><dd>{record.gap:.2f}</dd></dl></div></section>"
    )


def _findings(record, findings):
    if not findings:
        return (
            '<section><h2>Findings</h2><p class="finding healthy">No problems found: '
            "the moving statistics are those of the data.</p></section>"
        )
    cards = "\n".join(
        _card(list(group), record)
        for _, group in groupby(findings, key=lambda f: (f.severity, f.kind))
    )
    return f"<section><h2>Findings</h2>\n{cards}\n</section>"


def _card(same, record):
    """The findings of one kind: open if they are few, folded if they are many."""
    first = same[0]
    remedies = {finding.remedy for finding in same}
    items = "".join(
        f"<li>{_link(finding.layer, record)}: {escape(finding.message)}"
        + (f"<pre>{escape(finding.remedy)}</pre>" if len(remedies) > 1 else "")
        + "</li>"
        for finding in same
    )
    if len(same) == 1:
        where = f" in {_link(first.layer, record)}"
        body = f"<p>{escape(first.message)}</p>"
    else:
        where = f" in {len(same)} layers"
        opened = " open" if len(same) <= 3 else ""
        inner = f"<summary>Which, and how</summary><ul>{items}</ul>"
        body = f"<details{opened}>{inner}</details>"
    remedy = f"<pre>{escape(first.remedy)}</pre>" if len(remedies) == 1 else ""
    return (
        f'<article class="finding {first.severity}"><h3>'
        f'<span class="tag">{first.severity}</span> {first.kind}{where}</h3>'
        f"{body}{remedy}</article>"
    )


def _link(layer, record):
    for row, each in enumerate(record.layers):
        if each.layer == layer:
            return f'<a href="#layer-{row}">{escape(layer)}</a>'
    return escape(layer)


def _layers(record, findings):
    means = [layer.mean_drift for layer in record.layers]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [np.log2(layer.stddev_ratio) for layer in record.layers]
    of_mean = mean_limit(means)
    of_ratio = ratio_limit(ratios)
    of_means = f"−{of_mean:.2g}", "0", f"{of_mean:.2g} std"
    of_ratios = f"1/{2**of_ratio:.2g}", "1", f"{2**of_ratio:.2g}"
    rows = []
    for row, layer in enumerate(record.layers):
        mine = [f for f in findings if f.layer == layer.layer]
        drift = layer.drift
        cells = (
            _cell(
                f"{_MEAN} ({' … '.join(of_means)})",
                _strip(means[row], of_mean, WORST_MEAN_DRIFT, row),
                _said(means[row], drift.mean, drift.worst_mean, " std"),
            ),
            _cell(
                f"{_RATIO} ({' … '.join(of_ratios)})",
                _strip(ratios[row], of_ratio, np.log2(WORST_STDDEV_RATIO), row),
                _said(ratios[row], drift.ratio, drift.worst_ratio),
            ),
            _cell("Output gap", _bar(layer.gap), f"{layer.gap:.2f}"),
            _cell("Findings", _kinds(mine), ""),
        )
        rows.append(
            f'<tr id="layer-{row}" class="{_worst(mine)}"><th scope="row">'
            f"{escape(layer.layer)}<small>{_about(layer)}</small></th>"
            f"{''.join(cells)}</tr>"
        )
    titles = (
        ("Layer", ""),
        (_MEAN, _scale(*of_means)),
        (_RATIO, _scale(*of_ratios)),
        ("Output gap", _scale("0", "", f"{_FULL_GAP:g} or more")),
        ("Findings", ""),
    )
    head = "".join(f"<th>{title}{scale}</th>" for title, scale in titles)
    not_called = ""
    if record.not_called:
        not_called = f"<p>Not called: {escape(', '.join(record.not_called))}</p>"
    return f"""<section>
<h2>Layers, in the order the data passes them</h2>
<p class="legend">Each dot is a channel, each bar the median of a layer; a triangle is
off the scale. In the green band a channel counts as healthy. The gap is the difference
between a layer's outputs in training and in inference, relative to their spread.</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody>
</table>
{not_called}
</section>"""


def _said(values, typical, worst, unit=""):
    if lost := values.size - np.isfinite(values).sum():
        return f'<b class="error">{lost:,} of {values.size:,} not finite</b>'
    return f"typically {typical:.2f}, at worst {worst:.2f}{unit}"


def _cell(label, drawing, numbers):
    text = f"<small>{numbers}</small>" if numbers else ""
    return f'<td data-label="{label}">{drawing}{text}</td>'


def _scale(low, middle, high):
    return f'<span class="scale"><i>{low}</i><i>{middle}</i><i>{high}</i></span>'


def _about(layer):
    size = layer.moving_mean.size
    momentum = "mean" if layer.momentum is None else f"{layer.momentum:g}"
    frozen = ", frozen" if layer.frozen else ""
    return (
        f"{size:,} channel{'s' * (size > 1)}, {layer.elements:,.0f} elements per "
        f"batch, momentum {momentum}{frozen}"
    )


def _kinds(findings):
    if not findings:
        return '<span class="tag">healthy</span>'
    return " ".join(
        f'<span class="tag {finding.severity}">{finding.kind}</span>'
        for finding in findings
    )


def _strip(values, limit, healthy, seed):
    """The channels of a layer on an axis from -limit to limit, as inline SVG."""
    values = np.ravel(values)
    finite = np.sort(values[np.isfinite(values)])
    if finite.size > _DOTS:
        finite = finite[np.linspace(0, finite.size - 1, _DOTS).round().astype(int)]
    middle = _HEIGHT / 2

    def at(value):
        clipped = np.clip(value / limit, -1, 1)
        return _WIDTH / 2 + clipped * (_WIDTH / 2 - _MARGIN)

    scatter = np.random.default_rng(seed).uniform(-0.6, 0.6, finite.size) * middle
    inside = np.abs(finite) <= limit
    dots = "".join(
        f"M{at(x):.1f} {middle + dy:.1f}h0"
        for x, dy in zip(finite[inside], scatter[inside], strict=True)
    )
    beyond = "".join(
        f"M{at(x):.1f} {middle + dy - 3:.1f}v6l{np.sign(x) * 5:.0f}-3z"
        for x, dy in zip(finite[~inside], scatter[~inside], strict=True)
    )
    low, high = at(-healthy), at(healthy)
    parts = [
        f'<rect class="band" x="{low:.1f}" width="{high - low:.1f}" y="0" '
        f'height="{_HEIGHT}"/>',
        f'<path class="zero" d="M{at(0):.1f} 0v{_HEIGHT}"/>',
        f'<path class="dots" d="{dots}"/>' if dots else "",
        f'<path class="beyond" d="{beyond}"/>' if beyond else "",
    ]
    if finite.size:
        parts.append(
            f'<path class="median" d="M{at(np.median(finite)):.1f} 3v{_HEIGHT - 6}"/>'
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="channels of the layer">{"".join(parts)}</svg>'
    )


def _bar(gap):
    share = min(gap / _FULL_GAP, 1.0) if np.isfinite(gap) else 1.0
    return f'<div class="bar"><div style="width:{share:.0%}"></div></div>'
