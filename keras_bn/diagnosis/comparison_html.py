"""A comparison in HTML: what went, what came, the drift of both."""

from html import escape

from keras_bn.diagnosis import html
from keras_bn.pages import display


def page(comparison):
    """The comparison as one self-contained page; a string of HTML."""
    return display.page(_title(comparison), _body(comparison))


def fragment(comparison):
    """The comparison to display in a notebook; a string of HTML."""
    return display.fragment(_body(comparison))


def _title(comparison):
    names = (comparison.before.record.model, comparison.after.record.model)
    return " and ".join(dict.fromkeys(names))


def _body(comparison):
    parts = _head(comparison), _numbers(comparison), _findings(comparison)
    return "\n".join([*parts, _layers(comparison)])


def _head(comparison):
    counts = [
        f"{len(found)} {what}"
        for what, found in (
            ("gone", comparison.gone),
            ("new", comparison.new),
            ("remaining", comparison.remaining),
        )
        if found
    ]
    done = getattr(comparison, "done", None)
    return f"""<header class="{html.worst(comparison.after.findings)}">
<p class="kicker">Batch normalization, before and after</p>
<h1>{escape(_title(comparison))}</h1>
<p class="verdict">{", ".join(counts) or "no findings before and after"}</p>
{f"<p>{escape(done)}</p>" if done else ""}
</header>"""


def _numbers(comparison):
    before, after = comparison.before.record, comparison.after.record
    tiles = []
    for name, form, first, second in (
        ("Loss in inference", "{:.3g}", before.loss, after.loss),
        ("Accuracy in inference", "{:.1%}", before.accuracy, after.accuracy),
    ):
        if first is not None and second is not None:
            both = form.format(first[0]), form.format(second[0])
            tiles.append(html.tile(name, *zip(("before", "after"), both, strict=True)))
    if before.has_data and after.has_data:
        gaps = f"{before.gap:.2f}", f"{after.gap:.2f}"
        tiles.append(html.tile(html.GAP, *zip(("before", "after"), gaps, strict=True)))
    return f'<section class="numbers">{"".join(tiles)}</section>' if tiles else ""


def _findings(comparison):
    sections = []
    for title, found, report in (
        ("New", comparison.new, comparison.after),
        ("Remaining", comparison.remaining, comparison.after),
    ):
        if found:
            shown = html.cards(found, report.record, None)
            sections.append(f"<section><h2>{title}</h2>\n{shown}\n</section>")
    if comparison.gone:
        items = "".join(
            f"<li>{html.tags([each], 's')} {escape(each.layer)} "
            f'<span class="rule">{each.rule}</span></li>'
            for each in comparison.gone
        )
        gone = f'<div class="finding healthy"><ul>{items}</ul></div>'
        sections.append(f"<section><h2>Gone</h2>\n{gone}\n</section>")
    return "\n".join(sections)


def _layers(comparison):
    columns = html.Columns(
        [each for _, *pair in comparison.layers for each in pair if each is not None]
    )
    rows = []
    for row, (path, *pair) in enumerate(comparison.layers):
        reports = comparison.before, comparison.after
        mine = [[f for f in r.findings if f.layer == path] for r in reports]
        gone = [f for f in mine[0] if f in comparison.gone]
        marks = [
            f'<div class="pair {html.worst(found)}"><small>{when}</small>{{}}</div>'
            for when, found in zip(("before", "after"), mine, strict=True)
        ]
        kinds = f"{html.tags(gone, 's')} {html.tags(mine[1])}".strip()
        cells = [
            f"{escape(path)}<small>{html.about(pair[1] or pair[0])}</small>",
            *columns.cells(pair, row, marks),
            display.cell("Findings", kinds or '<span class="tag">healthy</span>'),
        ]
        rows.append((f'class="{html.worst(mine[1])}"', cells))
    return html.layers_section(columns, rows)
