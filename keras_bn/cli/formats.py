"""Reports on model files in the formats that editors and CI systems read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree

from keras_bn.diagnosis import text as words
from keras_bn.diagnosis.rules import RULES, SCHEMA_VERSION, SEVERITIES
from keras_bn.pages.plain import escaped
from keras_bn.version import __version__

if TYPE_CHECKING:
    from keras_bn.diagnosis.findings import Finding
    from keras_bn.diagnosis.report import Report


class Checked(NamedTuple):
    """A model file, its report, and the commands that fix what was found."""

    file: str
    report: "Report"
    command: Callable[["Finding"], str | None] | None = None


class Unchecked(NamedTuple):
    """A model file that cannot be checked, and why not."""

    file: str
    reason: str


def text(checked, unchecked, fail_on, quiet=False):
    """The findings by rule, with their remedies, and a last line that counts.

    Args:
        checked: a list of `Checked`.
        unchecked: a list of `Unchecked`.
        fail_on: the least severity that fails.
        quiet: whether to leave out the last lines.
    """
    lines = []
    for file, report, command in checked:
        name = escaped(file)
        for group in words.grouped(report.findings):
            message, *more = (text for text, _ in words.details(group, command))
            lines.append(f"{name}: {words.heading(group)}: {message}")
            lines += [f"    {line}" for line in more]
        if report.ignored:
            lines.append(f"{name}: ignored: {words.kinds(report.ignored)}")
    lines += [
        f"{escaped(file)}: error   not checked: {escaped(reason)}"
        for file, reason in unchecked
    ]
    if not quiet:
        lines += _closing(checked, unchecked)
    return "".join(f"{line}\n" for line in lines)


def _closing(checked, unchecked):
    """What was not looked for, and how much of what was found."""
    if checked and (missing := checked[0].report.not_looked_for):
        yield f"Not looked for without --data: {', '.join(missing)}"
    parts = []
    if checked:
        counts = [_several(n, s) for s, n in _counts(checked).items() if n]
        models = _several(len(checked), "model")
        parts.append(f"{', '.join(counts) or 'No problems'} in {models}")
    if unchecked:
        parts.append(f"{_several(len(unchecked), 'file')} not checked")
    yield f"{'; '.join(parts)}."


def as_json(checked, unchecked, fail_on, quiet=False):
    """One object; its JSON Schema is `$defs/check` in `docs/report.schema.json`."""
    results = {
        "schema_version": SCHEMA_VERSION,
        "fail_on": fail_on,
        "failed": bool(unchecked)
        or any(report.at_least(fail_on) for _, report, _ in checked),
        "models": [
            {"file": file, "diagnosis": report.to_dict()} for file, report, _ in checked
        ],
        "unchecked": [failure._asdict() for failure in unchecked],
    }
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def junit(checked, unchecked, fail_on, quiet=False):
    """JUnit's XML as pytest writes it: a suite for each file, a case for each rule."""
    root = ElementTree.Element("testsuites", name="keras-bn check")
    for file, report, _ in checked:
        failing = report.at_least(fail_on)
        kinds = {finding.kind for finding in failing}
        counts = {"failures": len(kinds), "skipped": len(report.not_looked_for)}
        suite = _suite(root, file, tests=len(RULES), **counts)
        for rule in RULES.values():
            case = _case(suite, file, f"{rule.id} {rule.kind}")
            findings = [f for f in report.findings if f.kind == rule.kind]
            message = "\n".join(
                f"{escaped(f)}\n-> {escaped(f.remedy)}" for f in findings
            )
            if rule.kind in kinds:
                failure = ElementTree.SubElement(
                    case, "failure", message=escaped(findings[0])
                )
                failure.text = message
            elif rule.kind in report.not_looked_for:
                ElementTree.SubElement(case, "skipped", message="needs --data")
            elif findings:
                ElementTree.SubElement(case, "system-out").text = message
    for file, reason in unchecked:
        suite = _suite(root, file, tests=1, errors=1)
        case = _case(suite, file, "checked")
        ElementTree.SubElement(case, "error", message=escaped(reason))
    ElementTree.indent(root, " ")
    declared = '<?xml version="1.0" encoding="utf-8"?>\n'
    return declared + ElementTree.tostring(root, encoding="unicode") + "\n"


def sarif(checked, unchecked, fail_on, quiet=False):
    """SARIF 2.1.0, for code scanning.

    The location of a finding is the first line of the model file, and the layer in it
    as a logical location: GitHub wants a line. A file that cannot be checked is no
    result in SARIF, but a notification of an invocation that failed.
    """
    rules = list(RULES)
    driver = {
        "name": "keras-bn",
        "version": __version__,
        "rules": [
            {
                "id": rule.id,
                "name": rule.kind,
                "shortDescription": {"text": rule.says},
                "help": {"text": f"docs/faq.md#{rule.anchor}"},
            }
            for rule in RULES.values()
        ],
    }
    results = [
        {
            "ruleId": finding.rule,
            "ruleIndex": rules.index(finding.kind),
            "level": finding.severity,
            "message": {
                "text": f"{finding.layer}: {finding.message} Remedy: {finding.remedy}"
            },
            "locations": [
                {
                    **_first_line(file),
                    "logicalLocations": [{"fullyQualifiedName": finding.layer}],
                }
            ],
        }
        for file, report, _ in checked
        for finding in report.findings
    ]
    invocation = {
        "executionSuccessful": not unchecked,
        "toolExecutionNotifications": [
            {
                "level": "error",
                "message": {"text": reason},
                "locations": [_first_line(file)],
            }
            for file, reason in unchecked
        ],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "results": results,
    }
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [run],
    }
    return json.dumps(log, indent=1) + "\n"


def github(checked, unchecked, fail_on, quiet=False):
    """The commands of GitHub Actions that annotate a run."""
    level = {"error": "error", "warning": "warning", "note": "notice"}

    def line(severity, file, title, message):
        place = f"file={_property(file)},title={_property(title)}"
        return f"::{level[severity]} {place}::{_data(message)}\n"

    lines = []
    for file, report, command in checked:
        for group in words.grouped(report.findings):
            first, many = group[0], len(group)
            where = first.layer if many == 1 else f"{many} layers"
            message, *more = (text for text, _ in words.details(group, command))
            text = "\n".join([f"{escaped(where)}: {message}", *more])
            title = f"{first.rule} {first.kind}"
            lines.append(line(first.severity, file, title, text))
    lines += [
        line("error", file, "not checked", escaped(reason))
        for file, reason in unchecked
    ]
    return "".join(lines)


FORMATS = {
    "text": text,
    "json": as_json,
    "junit": junit,
    "sarif": sarif,
    "github": github,
}


def _counts(checked):
    findings = [f for _, report, _ in checked for f in report.findings]
    return {s: sum(f.severity == s for f in findings) for s in SEVERITIES}


def _several(n, what):
    """The number and the noun, such as "1 model", "2 models"."""
    return f"{n} {what}{'s' * (n != 1)}"


def _suite(root, file, tests, errors=0, failures=0, skipped=0):
    counts = {"errors": errors, "failures": failures, "skipped": skipped}
    counts = {name: str(n) for name, n in {**counts, "tests": tests}.items()}
    return ElementTree.SubElement(
        root, "testsuite", name=escaped(file), **counts, time="0.000"
    )


def _case(suite, file, name):
    return ElementTree.SubElement(
        suite, "testcase", classname=escaped(file), name=name, time="0.000"
    )


def _first_line(file):
    path = Path(file)
    uri = path.as_uri() if path.is_absolute() else quote(path.as_posix())
    where = {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}
    return {"physicalLocation": where}


def _data(message):
    return message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(message):
    return escaped(_data(message).replace(":", "%3A").replace(",", "%2C"))
