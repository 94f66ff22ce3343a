"""`keras-bn check` and `assert_healthy`: statuses, and every format."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
from conftest import require
from keras import layers
from support import command_line

import keras_bn
from keras_bn.diagnosis.rules import RULES

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"


def run(*arguments):
    return command_line.run("check", *arguments)


def refused(capsys, *arguments):
    return command_line.refused(capsys, "check", *arguments)


def data(n=200):
    return np.random.default_rng(0).normal(5.0, 2.0, (n, 4)).astype("float32")


def made(name, mended):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, name="dense"),
            layers.BatchNormalization(name="bn"),
            layers.Dense(2, name="head"),
        ],
        name=name,
    )
    if mended:
        keras_bn.recalibrate(model, data(), verbose=0)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A healthy model with a note, one with an error, and data."""
    folder = tmp_path_factory.mktemp("check")
    made("good", True).save(folder / "good.keras")
    made("bad", False).save(folder / "bad one.keras")
    np.savez(folder / "data.npz", x=data())
    return folder / "good.keras", folder / "bad one.keras", folder / "data.npz"


def test_the_exit_status_is_what_fails_a_build(files, capsys):
    good, bad, samples = files
    assert run(good) == 0
    assert run(bad) == 1
    assert run(good, bad) == 1
    assert run(bad, "--ignore", "BN001") == 0
    assert run(good, "--fail-on", "note") == 1
    assert run(good, "--fail-on", "note", "--ignore", "redundant-bias") == 0
    assert run(good, "--data", samples) == 0
    assert run(bad, "--data", samples, "--ignore", "BN001") == 1  # the gap


@pytest.fixture
def partly(files, tmp_path):
    """Two files that cannot be checked, around one with an error."""
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)], name="plain")
    plain.save(tmp_path / "plain.keras")
    return tmp_path / "gone.keras", files[1], tmp_path / "plain.keras"


REASONS = "there is no file ", "'plain' has no batch normalization in it."


def test_what_cannot_be_checked_is_named_and_the_rest_reported(partly, capsys):
    gone, bad, plain = partly
    assert run(*partly) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(x.startswith(f"{bad}: error   never-updated") for x in lines)
    assert f"{gone}: error   not checked: {REASONS[0]}{gone}" in lines
    assert f"{plain}: error   not checked: {REASONS[1]}" in lines
    assert lines[-1] == "1 error, 1 note in 1 model; 2 files not checked."
    assert run(gone) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "1 file not checked."
    data = gone.with_name("gone.npz")
    assert f"there is no file {data}" in refused(capsys, bad, "--data", data)


def test_json_of_what_cannot_be_checked(partly, capsys):
    status, out = printed(capsys, *partly, "--format", "json", "--ignore", "BN001")
    results = json.loads(out)
    assert (status, results["failed"]) == (2, True)
    assert [each["file"] for each in results["models"]] == [str(partly[1])]
    named = [each["file"] for each in results["unchecked"]]
    assert named == [str(partly[0]), str(partly[2])]
    for each, reason in zip(results["unchecked"], REASONS, strict=True):
        assert each["reason"].startswith(reason)


def test_junit_of_what_cannot_be_checked(partly, capsys):
    status, out = printed(capsys, *partly, "--format", "junit")
    assert status == 2
    bad, *others = ElementTree.fromstring(out.encode())
    assert (bad.get("name"), bad.get("errors")) == (str(partly[1]), "0")
    for suite, file, reason in zip(others, partly[::2], REASONS, strict=True):
        assert suite.get("name") == str(file)
        assert (suite.get("tests"), suite.get("errors")) == ("1", "1")
        assert suite.find("testcase/error").get("message").startswith(reason)


def test_sarif_of_what_cannot_be_checked(partly, capsys):
    status, out = printed(capsys, *partly, "--format", "sarif")
    assert status == 2
    (found,) = json.loads(out)["runs"]
    assert len(found["results"]) == 2
    (invocation,) = found["invocations"]
    assert invocation["executionSuccessful"] is False
    told = invocation["toolExecutionNotifications"]
    for each, file, reason in zip(told, partly[::2], REASONS, strict=True):
        assert each["level"] == "error"
        assert each["message"]["text"].startswith(reason)
        (location,) = each["locations"]
        uri = location["physicalLocation"]["artifactLocation"]["uri"]
        assert uri == file.as_uri()


def test_github_of_what_cannot_be_checked(partly, capsys):
    status, out = printed(capsys, *partly, "--format", "github")
    assert status == 2
    lines = out.splitlines()[-2:]
    for line, file, reason in zip(lines, partly[::2], REASONS, strict=True):
        start = f"::error file={file},title=not checked::{reason}"
        assert line.startswith(start)


def test_fail_on_error_lets_warnings_pass(files, capsys):
    small = files[0], "--data", files[2], "--batch-size", 4
    assert run(*small) == 1
    assert run(*small, "--fail-on", "error") == 0


def test_text(files, capsys):
    run(files[0], files[1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{files[0]}: note    redundant-bias: bn (BN010): The")
    assert any(f"{files[1]}: error   never-updated: bn (BN001)" in x for x in lines)
    assert "    -> keras_bn.recalibrate(model, x)" in lines
    assert lines[-2].startswith("Not looked for without --data: momentum-too-slow")
    assert lines[-1] == "1 error, 2 notes in 2 models."
    run(files[0], "--data", files[2], "--ignore", "BN010")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "No problems in 1 model."


def printed(capsys, *arguments):
    status = run(*arguments)
    return status, capsys.readouterr().out


def test_json(files, capsys):
    status, out = printed(capsys, *files[:2], "--format", "json")
    results = json.loads(out)
    assert status == 1
    assert results["failed"] is True
    assert [each["file"] for each in results["models"]] == [str(f) for f in files[:2]]
    assert results["models"][1]["diagnosis"]["findings"][0]["rule"] == "BN001"


def test_the_json_is_as_its_schema_says(files, capsys):
    jsonschema = require("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    whole = jsonschema.Draft202012Validator(schema)
    nan = made("lost", True)
    nan.get_layer("bn").moving_mean.assign(np.full(6, np.nan))
    reports = [keras_bn.diagnose(nan, data()), keras_bn.diagnose(nan, ignore="BN002")]
    for report in reports:
        whole.validate(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    gone = files[0].with_name("gone.keras")
    _, out = printed(capsys, *files[:2], gone, "--format", "json")
    results = json.loads(out)
    for each in results["models"]:
        whole.validate(each["diagnosis"])
    assert set(schema["$defs"]["check"]["properties"]) == set(results)
    unchecked = schema["$defs"]["check"]["properties"]["unchecked"]["items"]
    assert set(unchecked["properties"]) == set(results["unchecked"][0])
    # It can fail, and describes every key.
    broken = reports[0].to_dict()
    assert set(schema["properties"]) == set(broken)
    assert set(schema["$defs"]["layer"]["properties"]) == set(broken["layers"][0])
    assert set(schema["$defs"]["finding"]["properties"]) == set(broken["findings"][0])
    del broken["healthy"]
    assert not whole.is_valid(broken)


def test_junit(files, capsys):
    _, out = printed(capsys, *files[:2], "--format", "junit")
    good, bad = ElementTree.fromstring(out.encode())
    for suite, file in ((good, files[0]), (bad, files[1])):
        assert suite.get("name") == str(file)
        assert len(suite) == int(suite.get("tests")) == len(RULES)
        skipped = sum(rule.needs_data for rule in RULES.values())
        assert len(suite.findall("testcase/skipped")) == skipped
        assert int(suite.get("skipped")) == skipped
        failures = suite.findall("testcase/failure")
        assert len(failures) == int(suite.get("failures"))
    assert good.get("failures") == "0"
    (case,) = [each for each in bad if each.find("failure") is not None]
    assert case.get("name") == "BN001 never-updated"
    assert "recalibrate" in case.find("failure").text


def test_sarif(files, capsys, monkeypatch):
    """What the specification requires, and what GitHub needs beyond that."""
    monkeypatch.chdir(files[0].parent)
    _, out = printed(capsys, "good.keras", "bad one.keras", "--format", "sarif")
    log = json.loads(out)
    assert log["version"] == "2.1.0"
    (found,) = log["runs"]
    assert found["invocations"][0]["executionSuccessful"] is True
    driver = found["tool"]["driver"]
    assert driver["name"] == "keras-bn"
    assert [each["id"] for each in driver["rules"]] == [r.id for r in RULES.values()]
    assert all(each["shortDescription"]["text"] for each in driver["rules"])
    assert len(found["results"]) == 3
    for result in found["results"]:
        assert result["message"]["text"]
        assert result["level"] in ("error", "warning", "note")
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        (location,) = result["locations"]
        uri = location["physicalLocation"]["artifactLocation"]["uri"]
        assert uri in ("good.keras", "bad%20one.keras")
        assert location["physicalLocation"]["region"]["startLine"] == 1
        assert location["logicalLocations"] == [{"fullyQualifiedName": "bn"}]


def test_github(files, capsys):
    _, out = printed(capsys, files[1], "--format", "github")
    first = out.splitlines()[0]
    assert re.fullmatch(
        r"::error file=.*bad one\.keras,title=BN001 never-updated::bn: The moving .*"
        r"%0A-> keras-bn recalibrate .* --data DATA"
        r"%0A-> keras_bn\.recalibrate\(model, x\)",
        first,
    )
    assert out.splitlines()[1].startswith("::notice file=")


def test_github_escapes_what_it_reads_otherwise():
    from keras_bn.cli import formats
    from keras_bn.diagnosis.findings import Finding
    from keras_bn.diagnosis.report import Report

    report = keras_bn.diagnose(made("m", True))
    finding = Finding("frozen", "a", "note", "10 % of\nit", "this")
    checked = [formats.Checked("a,b:c", Report(report.record, [finding]))]
    line = formats.github(checked, [], "")
    assert "file=a%2Cb%3Ac," in line
    assert "10 %25 of\\nit%0A-> this" in line


def test_output_to_a_file(files, tmp_path, capsys):
    target = tmp_path / "a.sarif"
    arguments = [files[1], "--format", "sarif", "--output", target]
    assert run(*arguments) == 1
    assert capsys.readouterr().out == ""
    assert json.loads(target.read_text())["version"] == "2.1.0"
    assert "--force" in refused(capsys, *arguments)
    assert run(*arguments, "--force") == 1


def test_what_cannot_be_done_ends_with_a_sentence(files, capsys):
    assert "--format" in refused(capsys, files[0], "--format", "yaml")
    assert "--ignore" in refused(capsys, files[0], "--ignore", "BN999")


def test_assert_healthy():
    good, bad = made("good", True), made("bad", False)
    keras_bn.testing.assert_healthy(good)
    keras_bn.testing.assert_healthy(good, data())
    keras_bn.testing.assert_healthy(bad, ignore=["BN001"])
    with pytest.raises(
        AssertionError, match=r"1 findings?, warning or worse(.|\n)*BN001"
    ) as raised:
        keras_bn.testing.assert_healthy(bad)
    # What pytest shows ends at the line that calls it.
    assert raised.traceback.filter(raised)[-1].path == Path(__file__)
    with pytest.raises(AssertionError, match="redundant-bias"):
        keras_bn.testing.assert_healthy(good, fail_on="note")
    small = {"batch_size": 4, "steps": 2}
    keras_bn.testing.assert_healthy(good, data(), ignore=["BN011"], steps=2)
    with pytest.raises(
        AssertionError, match=r"8 samples in 2 batches(.|\n)*small-batch"
    ):
        keras_bn.testing.assert_healthy(good, data(), ignore=["BN011"], **small)
    with pytest.raises(ValueError, match="`fail_on` must be one of error, warning"):
        keras_bn.testing.assert_healthy(good, fail_on="fatal")
