"""The command line, and `verify`: statuses, what it prints and what it writes."""

import json
import os
import pathlib

import keras
import pytest
from support.backend import NAME, eagerly_too
from support.command_line import refused, run

import keras_bn
from keras_bn.backends import modes
from keras_bn.cli import arguments as command_line
from keras_bn.cli import main, verify
from keras_bn.verify import cases, judge

FEW = [
    cases.Case((64, 4), -1, "float32", "eager"),
    cases.Case((6, 4, 5, 5), 1, "float32", modes.USUAL, mean=1e3),
    cases.Case((64, 4), -1, "float16", "eager"),
]


class WrongEpsilon(keras_bn.BatchNormalization):
    """In float32."""

    def __init__(self, epsilon, dtype, **arguments):
        epsilon *= 2 if dtype == "float32" else 1
        super().__init__(epsilon=epsilon, dtype=dtype, **arguments)


@pytest.fixture
def settings(monkeypatch):
    """Sets the function that gives the cases of the command."""
    return lambda give: monkeypatch.setattr(cases, "cases", give)


@pytest.fixture
def few(settings):
    settings(lambda quick=False: FEW)


def proof(*options, **layers):
    """The exit status of a proof of these layers in a few settings."""
    arguments = command_line.parser().parse_args(["verify", *options])
    return verify.show(arguments, judge.verify(FEW, **layers))


def usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main.main(arguments)
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.slow
def test_quick_proof_passes(tmp_path, capsys, monkeypatch):
    """On two shapes; all of them are proved from the wheel (`.ci/wheel`)."""
    monkeypatch.setattr(cases, "SHAPES", [cases.SHAPES[0], cases.SHAPES[4]])
    monkeypatch.setattr(modes, "MODES", eagerly_too(modes.MODES))
    file = tmp_path / "proof.json"
    assert main.main(["verify", "--quick", "--seed", "1", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    every = cases.cases(quick=True)
    for name in ("keras_bn", "keras", NAME, "python"):
        assert f"{name} {judge.environment()[name]}" in out.splitlines()[0]
    assert judge.environment()["device"] in out.splitlines()[0]
    for case in every:
        shape = "×".join(map(str, case.shape))
        rows = [line.split() for line in out.splitlines() if line.startswith(shape)]
        assert any(case.mode in row and case.dtype in row for row in rows)
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert out.splitlines()[-1] == f"PASS: {len(every)} of {len(every)} comparisons"

    results = json.loads(file.read_text())
    assert results["passed"] is True
    assert results["seed"] == 1
    assert results["environment"] == judge.environment()
    assert len(results["records"]) == len(every)
    for record, case in zip(results["records"], every, strict=True):
        assert (tuple(record["shape"]), record["dtype"]) == (case.shape, case.dtype)
        assert record["verdict"] == "PASS"
        assert len(record["checks"]) == 7
        for check in record["checks"].values():
            assert check["ours"] <= check["limit"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_wrong_layer_fails_the_command(capsys):
    assert proof(ours=WrongEpsilon) == 1
    out = capsys.readouterr().out
    verdict = out[out.index("FAIL: 2 of 3 comparisons") :].splitlines()
    assert len(verdict) == 3
    assert verdict[1].startswith("  FAIL 64×4 axis -1 float32 eager: output ")
    assert verdict[2].startswith(
        f"  FAIL 6×4×5×5 axis 1 float32 at 1e3 {modes.USUAL}: "
    )


def test_json_alone_on_stdout(capsys):
    assert proof("--json", "-", ours=WrongEpsilon) == 1
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert results["passed"] is False
    verdicts = [record["verdict"] for record in results["records"]]
    assert verdicts == ["FAIL", "FAIL", "PASS"]
    assert "FAIL: 2 of 3 comparisons" in captured.err


def test_json_has_no_numbers_that_json_has_not(capsys):
    class NotFinite(keras_bn.BatchNormalization):
        def call(self, inputs, training=None):
            return super().call(inputs, training=training) * float("nan")

    assert proof("--json", "-", ours=NotFinite) == 1

    def refuse(constant):
        raise AssertionError(constant)

    results = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert results["records"][0]["checks"]["output"]["ours"] is None


@pytest.mark.parametrize(
    ("side", "texts"),
    [
        ("ours", ["FAIL: 3 of 3 comparisons", "our layer raised MemoryError: [too]"]),
        (
            "theirs",
            ["FAIL: nothing could be compared", "Keras's layer raised MemoryError"],
        ),
    ],
)
def test_layers_that_raise_are_listed(side, texts, capsys):
    class Raises(keras.layers.BatchNormalization):
        def build(self, input_shape):
            raise MemoryError("[too] large")

    assert proof(**{side: Raises}) == 1
    out = capsys.readouterr().out
    assert all(text in out for text in texts)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["prove"], "prove"),
        (["verify", "--seed", "-1"], "--seed"),
        (["verify", "--seed", "many"], "--seed"),
        (["verify", "--fast"], "--fast"),
        (["verify", "--json"], "--json"),
        (["bench", "-q"], "-q"),
        (["rule", "-q"], "-q"),
    ],
)
def test_usage_errors(arguments, named, capsys):
    assert named in usage_error(arguments, capsys)


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_files_that_cannot_be_looked_at(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop.keras", "loop.keras")
    for name, words in (
        ("loop.keras", "loop.keras can't be read: too many levels of symbolic links"),
        ("a" * 300 + ".keras", "aaa.keras can't be read: file name too long"),
        (".", ". is a folder, not a file"),
    ):
        if command == "check":
            assert run("check", name) == 2
            out = capsys.readouterr().out
            assert "error   not checked: " in out
            assert words in out
        else:
            assert words in refused(capsys, "inspect", name)


def test_existing_files_are_kept_unless_forced(few, tmp_path, capsys):
    file = tmp_path / "proof.json"
    file.write_text("mine")
    assert "--force" in usage_error(["verify", "--json", str(file)], capsys)
    assert file.read_text() == "mine"
    assert main.main(["verify", "--json", str(file), "--force"]) == 0
    assert json.loads(file.read_text())["passed"] is True
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_can_not_be_written_are_refused_at_once(tmp_path, capsys):
    nowhere = tmp_path / "missing" / "proof.json"
    assert "no folder" in usage_error(["verify", "--json", str(nowhere)], capsys)
    arguments = ["verify", "--force", "--json", str(tmp_path)]
    assert "not a regular file" in usage_error(arguments, capsys)


def test_a_file_that_appears_meanwhile_is_kept(settings, tmp_path):
    file = tmp_path / "proof.json"

    def slow(quick=False):
        file.write_text("theirs")
        return FEW[:1]

    settings(slow)
    with pytest.raises(SystemExit) as raised:
        main.main(["verify", "--json", str(file)])
    assert raised.value.code == 2
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "theirs"


def test_nothing_half_written_is_left(few, tmp_path, monkeypatch):
    def full(path, text, **arguments):
        with open(path, "w") as part:
            part.write(text[:10])
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(SystemExit) as raised:
        main.main(["verify", "--json", str(tmp_path / "proof.json")])
    assert raised.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_interrupted(settings, tmp_path):
    def interrupt(quick=False):
        raise KeyboardInterrupt

    settings(interrupt)
    file = tmp_path / "proof.json"
    assert main.main(["verify", "--json", str(file)]) == 130
    assert not file.exists()


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main.main(arguments)
    assert raised.value.code == 0
    assert "verify" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as raised:
        main.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"keras_bn {keras_bn.__version__}\n"
