"""Reports as text for a terminal."""

import textwrap

from keras_bn.diagnosis.rules import SEVERITIES
from keras_bn.pages import plain
from keras_bn.pages.plain import escaped


def lines_of(report, command=None):
    """The lines of a report.

    Args:
        report: a `Report`.
        command: `command(finding)`, the command that fixes it, or None; none by
            default.

    Returns:
        A list of strings.
    """
    record, model = report.record, escaped(report.record.model)
    if record.has_data:
        batches = "batches" if record.batches > 1 else "batch"
        lines = [
            f"{model}: {record.samples} samples in {record.batches} {batches}",
            *_both_ways(record),
            "",
            *plain.lines(plain.table(_HEADER, map(_row, record.measured))),
        ]
    else:
        count = len(record.layers)
        layers = "batch normalizations" if count > 1 else "batch normalization"
        lines = [f"{model}: {count} {layers}, without data"]
    if record.not_called:
        lines += ["", f"Not called: {', '.join(map(escaped, record.not_called))}"]
    lines += ["", *findings(report.findings, command)]
    if not report.findings:
        lines.append("No problems found.")
    elif report.healthy:
        lines.append("No errors, no warnings.")
    if omitted := omissions(report):
        lines += ["", *omitted]
    return lines


def omissions(report):
    """The lines about what a report leaves out."""
    lines = []
    if report.ignored:
        lines.append(f"Ignored: {kinds(report.ignored)}")
    if report.not_looked_for:
        missing = ", ".join(report.not_looked_for)
        lines.append(f"Not looked for, since that needs data: {missing}")
    return lines


def findings(items, command=None):
    """The lines of a list of `Finding`, by rule, with messages and remedies."""
    lines = []
    for group in grouped(items):
        lines.append(heading(group))
        for text, is_code in details(group, command):
            # Code is copied, so it stays in one line.
            lines += [f"{_INDENT}{text}"] if is_code else _wrapped(text)
    return lines


def grouped(items):
    """Lists of the findings of one severity and rule, the most severe first."""
    groups: dict = {}
    for finding in items:
        groups.setdefault((finding.severity, finding.kind), []).append(finding)
    order = SEVERITIES.index
    return sorted(groups.values(), key=lambda group: order(group[0].severity))


def heading(group):
    """The findings of one rule in a line, without their messages."""
    first, many = group[0], len(group)
    where = escaped(first.layer) if many == 1 else f"{many} layers"
    return f"{first.severity:7} {first.kind}: {where} ({first.rule})"


# Of how many layers a group shows the messages, if these differ.
_SHOWN = 3


def details(group, command=None):
    """What is wrong, what helps and where, of the findings of one rule.

    Args:
        group: a list of them.
        command: as in `lines_of`.

    Yields:
        Pairs of a text, and whether it is code.
    """
    messages = list(dict.fromkeys(finding.message for finding in group))
    layers = [finding.layer for finding in group]
    if len(messages) == 1:
        yield escaped(messages[0]), False
    else:
        for finding in group[:_SHOWN]:
            yield escaped(f"{finding.layer}: {finding.message}"), False
        layers = layers[_SHOWN:]
    remedies = [
        (text, finding.fix is not None)
        for finding in group
        for text in (command and command(finding), finding.remedy)
        if text
    ]
    for text, is_code in list(dict.fromkeys(remedies))[: 2 * _SHOWN]:
        yield f"-> {escaped(text)}", is_code
    if len(group) > 1 and layers:
        begin = "in" if len(messages) == 1 else f"and {len(layers)} more:"
        yield f"{begin} {', '.join(map(escaped, layers))}", False


def kinds(items):
    """The kinds of some findings, in words, and how often there is each.

    >>> from keras_bn.diagnosis.findings import Finding
    >>> kinds([Finding("frozen", name, "note", "", "") for name in ("bn_1", "bn_2")])
    '2 frozen (BN008)'
    """
    counts: dict = {}
    for finding in items:
        kind = f"{finding.kind} ({finding.rule})"
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


_HEADER = (
    "layer",
    "elements\nper batch",
    "mean off, in std\nmedian",
    "\nworst",
    "std ratio\nmedian",
    "\nworst",
    "output\ngap",
)


def _row(layer):
    numbers = (*layer.drift, layer.gap)
    return [layer.layer, f"{layer.elements:,.0f}", *(f"{n:.2f}" for n in numbers)]


def _both_ways(record):
    for name, pair in (("loss", record.loss), ("accuracy", record.accuracy)):
        if pair is not None:
            yield (
                f"{name} {pair[0]:.4g} in inference, {pair[1]:.4g} with the "
                "statistics of each batch"
            )


_INDENT = " " * 8


def _wrapped(text):
    """Lines in which no name is broken."""
    return textwrap.wrap(
        text,
        80,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
