"""Reports as text for a terminal."""

import textwrap

from keras_bn.pages.plain import table


def lines_of(report):
    """The lines of a report.

    Args:
        report: a `Report`.

    Returns:
        A list of strings.
    """
    record = report.record
    if record.has_data:
        lines = [
            f"{record.model}: {record.samples} samples in {record.batches} batches",
            *_both_ways(record),
            "",
            *table(_HEADER, map(_row, record.measured)),
        ]
    else:
        count = len(record.layers)
        layers = "batch normalizations" if count > 1 else "batch normalization"
        lines = [f"{record.model}: {count} {layers}, without data"]
    if record.not_called:
        lines += ["", f"Not called: {', '.join(record.not_called)}"]
    lines += ["", *findings(report.findings)]
    if not report.findings:
        lines.append("No problems found.")
    elif report.healthy:
        lines.append("No errors, no warnings.")
    if report.ignored or report.not_looked_for:
        lines.append("")
    if report.ignored:
        lines.append(f"Ignored: {kinds(report.ignored)}")
    if report.not_looked_for:
        missing = ", ".join(report.not_looked_for)
        lines.append(f"Not looked for, since that needs data: {missing}")
    return lines


def findings(found):
    """The lines of a list of `Finding`, with messages and remedies."""
    lines = []
    for finding in found:
        lines += [
            heading(finding),
            *_wrapped(finding.message),
            *_wrapped(f"-> {finding.remedy}"),
        ]
    return lines


def heading(finding):
    """A finding in a line, without its message."""
    return f"{finding.severity:7} {finding.kind}: {finding.layer} ({finding.rule})"


def kinds(found):
    """The kinds of some findings, in words, and how often there is each.

    >>> from keras_bn.diagnosis.findings import Finding
    >>> kinds([Finding("frozen", name, "note", "", "") for name in ("bn_1", "bn_2")])
    '2 frozen (BN008)'
    """
    counts: dict = {}
    for finding in found:
        named = f"{finding.kind} ({finding.rule})"
        counts[named] = counts.get(named, 0) + 1
    return ", ".join(f"{count} {named}" for named, count in counts.items())


_HEADER = (
    ("", "elements", "mean off, in std", "", "std ratio", "", "output"),
    ("layer", "per batch", "median", "worst", "median", "worst", "gap"),
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


def _wrapped(text):
    return textwrap.wrap(text, 80, initial_indent=" " * 8, subsequent_indent=" " * 8)
