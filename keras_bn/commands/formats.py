"""Reports on model files in the formats that editors and CI systems read."""

import json
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree

from keras_bn.diagnosis import text as words
from keras_bn.diagnosis.report import SCHEMA_VERSION, Report
from keras_bn.diagnosis.rules import RULES, SEVERITIES
from keras_bn.version import __version__


class Checked(NamedTuple):
    """A model file and its report."""

    file: str
    report: Report


def text(checked, fail_on):
    """A line for each finding, with its remedy below, and a last line that counts.

    Args:
        checked: a list of `Checked`.
        fail_on: the least severity that fails.
    """
    lines = []
    for file, report in checked:
        for each in report.findings:
            lines.append(f"{file}: {words.heading(each)}: {each.message}")
            lines.append(f"    -> {each.remedy}")
        if report.ignored:
            lines.append(f"{file}: ignored: {words.kinds(report.ignored)}")
    if missing := checked[0].report.not_looked_for:
        lines.append(f"Not looked for without --data: {', '.join(missing)}")
    counts = _counts(checked)
    said = [f"{n} {s}{'s' * (n != 1)}" for s, n in counts.items() if n]
    models = f"{len(checked)} model{'s' * (len(checked) > 1)}"
    lines.append(f"{', '.join(said) or 'No problems'} in {models}.")
    return "\n".join(lines) + "\n"


def as_json(checked, fail_on):
    """One object; its JSON Schema is `$defs/check` in `docs/report.schema.json`."""
    results = {
        "schema_version": SCHEMA_VERSION,
        "fail_on": fail_on,
        "failed": any(each.report.at_least(fail_on) for each in checked),
        "models": [
            {"file": file, "diagnosis": report.to_dict()} for file, report in checked
        ],
    }
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def junit(checked, fail_on):
    """JUnit's XML as pytest writes it: a suite for each file, a case for each rule."""
    root = ElementTree.Element("testsuites", name="keras-bn check")
    for file, report in checked:
        failing = report.at_least(fail_on)
        kinds = {finding.kind for finding in failing}
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=file,
            errors="0",
            failures=str(len(kinds)),
            skipped=str(len(report.not_looked_for)),
            tests=str(len(RULES)),
            time="0.000",
        )
        for rule in RULES.values():
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=file,
                name=f"{rule.id} {rule.kind}",
                time="0.000",
            )
            mine = [each for each in report.findings if each.kind == rule.kind]
            said = "\n".join(f"{each}\n-> {each.remedy}" for each in mine)
            if rule.kind in kinds:
                failure = ElementTree.SubElement(case, "failure", message=str(mine[0]))
                failure.text = said
            elif rule.kind in report.not_looked_for:
                ElementTree.SubElement(case, "skipped", message="needs --data")
            elif mine:
                ElementTree.SubElement(case, "system-out").text = said
    ElementTree.indent(root, " ")
    declared = '<?xml version="1.0" encoding="utf-8"?>\n'
    return declared + ElementTree.tostring(root, encoding="unicode") + "\n"


def sarif(checked, fail_on):
    """SARIF 2.1.0, for code scanning.

    The location of a finding is the first line of the model file, and the layer in it
    as a logical location: GitHub wants a line.
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
                    "physicalLocation": {
                        "artifactLocation": {"uri": _uri(file)},
                        "region": {"startLine": 1},
                    },
                    "logicalLocations": [{"fullyQualifiedName": finding.layer}],
                }
            ],
        }
        for file, report in checked
        for finding in report.findings
    ]
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(log, indent=1) + "\n"


def github(checked, fail_on):
    """The commands of GitHub Actions that annotate a run."""
    level = {"error": "error", "warning": "warning", "note": "notice"}
    lines = [
        f"::{level[each.severity]} file={_property(file)},"
        f"title={_property(f'{each.rule} {each.kind}')}"
        f"::{_data(f'{each.layer}: {each.message}')}{_data(chr(10))}"
        f"{_data(f'-> {each.remedy}')}\n"
        for file, report in checked
        for each in report.findings
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
    findings = [each for _, report in checked for each in report.findings]
    return {s: sum(f.severity == s for f in findings) for s in SEVERITIES}


def _uri(file):
    path = Path(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())


def _data(said):
    return said.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(said):
    return _data(said).replace(":", "%3A").replace(",", "%2C")
