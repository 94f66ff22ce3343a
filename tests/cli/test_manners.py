"""What people know of other linters: quiet, selected, configured, safe to print."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
from keras import layers
from support.command_line import refused, run

import keras_bn
from keras_bn.cli.arguments import parser
from keras_bn.cli.modules import imported
from keras_bn.diagnosis.rules import RULES
from keras_bn.pages.plain import escaped

ROOT = Path(keras_bn.__file__).parents[1]
LONG = "a_block_of_a_deep_model_depthwise_convolution_normalization"
EVIL = "bn$a$\n::error::no\x1b[2J\x00\u202e##[add]&<b>"


def save(file, names, name="model"):
    stack = [keras.Input((4,))]
    for each in names:
        stack += [layers.Dense(4, use_bias=False)]
        stack += [layers.BatchNormalization(name=each)]
    keras.Sequential(stack, name=name).save(file)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: a model of many layers that were never updated, and data."""
    monkeypatch.chdir(tmp_path)
    save("many.keras", [f"{LONG}_{i}" for i in range(20)])
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(64, 4)))
    return tmp_path


def lines(capsys):
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", ["40", "200"])
def test_names_are_never_broken(folder, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert run("inspect", "many.keras") == 0
    out = lines(capsys)
    assert out[0].startswith(
        "In every row: channels 4, axis -1, momentum 0.99, epsilon"
    )
    table = out[2:24]
    for i in range(20):
        assert sum(line.startswith(f"{LONG}_{i} ") for line in table) == 1
    assert all(line == line.rstrip() for line in out)


def test_findings_are_grouped_by_rule(folder, capsys):
    run("inspect", "many.keras", "--data", "data.npz")
    out = "\n".join(lines(capsys))
    assert out.count("never-updated: 20 layers (BN001)") == 1
    assert out.count("are still the initial values") == 1
    assert (
        out.count("-> keras-bn recalibrate many.keras OUT.keras --data data.npz") == 1
    )
    run("check", "many.keras")
    out = lines(capsys)
    assert len(out) < 8
    assert out[0].startswith(
        "many.keras: error   never-updated: 20 layers (BN001): The"
    )
    names = ", ".join(f"{LONG}_{i}" for i in range(20))
    assert f"    in {names}" in out
    run("check", "many.keras", "--format", "github")
    out = capsys.readouterr().out
    assert out.count("::error ") == 1
    assert f"{LONG}_19" in out


@pytest.mark.slow
def test_before_and_after_are_grouped_too(folder):
    model = keras_bn.load_model("many.keras")
    x = np.load("data.npz")["x"]
    fixed = keras_bn.diagnose(model, np.tile(x, (2, 1)), batch_size=64).fix()
    assert "error   never-updated: 20 layers (BN001)" in str(fixed)
    assert len([line for line in str(fixed).splitlines() if "never" in line]) == 1
    assert str(fixed).startswith("Recalibrated 20 layers.\n")
    one = keras_bn.diagnose(model, x, batch_size=64)
    assert str(one).startswith("model: 64 samples in 1 batch\n")


def test_findings_that_differ_are_shown_by_example(folder):
    model = keras_bn.load_model("many.keras")
    rng = np.random.default_rng(0)
    for layer in model.layers[1::2]:
        layer.moving_variance.assign(-rng.uniform(1, 2, 4) * (rng.random(4) < 0.5))
        layer.moving_mean.assign(np.ones(4))
    text = str(keras_bn.diagnose(model, ignore=["dead-channel"]))
    group = text[text.index("negative-variance") :]
    assert f"{LONG}_" in group
    assert " more: " in " ".join(group.split())


@pytest.mark.parametrize("with_data", [True, False])
def test_the_repr_is_one_line(folder, with_data):
    model = keras_bn.load_model("many.keras")
    x = np.load("data.npz")["x"]
    report = keras_bn.diagnose(model, x if with_data else None)
    assert repr(report).startswith("<Report model: 20 errors")
    comparison = keras_bn.compare(report, report)
    assert repr(comparison).startswith("<Comparison model: ")
    plan = keras_bn.plan_fold(model)
    assert repr(plan) == "<Folds 20 of 20 can be folded>"
    samples = 64 if with_data else 0
    record = f"<ModelRecord model: layers: 20, samples: {samples}>"
    assert repr(report.record) == record
    assert "\n" not in repr(report) + repr(comparison)

    pretty = pytest.importorskip("IPython.lib.pretty", reason="it shows them")
    for each in report, comparison, plan:
        assert pretty.pretty(each) == str(each)


def test_evil_names_are_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()], name="m")
    model.layers[0].name = EVIL
    model.name = "::warning::m"
    report = keras_bn.diagnose(model)
    finding = report.findings[0]
    from keras_bn.cli.formats import FORMATS, Checked, Unchecked

    checked = [Checked(f"::error::{EVIL}", report)]
    unchecked = [Unchecked("::warning::b\n::error::c", f"{EVIL}\n::error::d")]
    assert finding.layer == EVIL
    texts = [str(report), str(keras_bn.plan_fold(model))]
    texts.append(str(keras_bn.compare(report, report)))
    texts.append(FORMATS["text"](checked, unchecked, "error"))
    texts.append(FORMATS["github"](checked, unchecked, "error"))
    for text in texts:
        assert all(line.isprintable() for line in text.splitlines())
        assert "##[" not in text
    for text in texts[:-1]:
        assert not any(line.lstrip().startswith("::") for line in text.splitlines())
    for line in texts[-1].splitlines():
        assert line.startswith(("::error file=", "::warning file="))
    assert len(texts[-1].splitlines()) == 2
    root = ElementTree.fromstring(FORMATS["junit"](checked, unchecked, "error"))
    (failure,) = root.iter("failure")
    assert escaped(EVIL) in failure.get("message")
    assert json.loads(FORMATS["json"](checked, unchecked, "error"))
    assert json.loads(FORMATS["sarif"](checked, unchecked, "error"))


@pytest.mark.parametrize("command", ["inspect", "convert", "fold"])
def test_warnings_about_evil_names_are_escaped(tmp_path, capsys, command):
    file = tmp_path / "lost.keras"
    name = EVIL.replace("\x00", "")  # which HDF5 refuses
    norm = layers.BatchNormalization(name=name)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), norm])
    norm.moving_mean.assign(np.full(4, np.nan))
    model.save(file)
    out = [] if command == "inspect" else [tmp_path / "out.keras"]
    run(command, file, *out)
    text = capsys.readouterr().out
    assert f"of '{escaped(name)}' are lost" in text
    assert all(line.isprintable() for line in text.splitlines())
    assert not any(line.lstrip().startswith("::") for line in text.splitlines())


def test_evil_names_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="it draws")
    name = EVIL + "$_{\\foo}$"
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    x = np.random.default_rng(0).normal(size=(64, 4))
    report = keras_bn.diagnose(model, x)
    report.record.model = report.record.layers[0].layer = name
    report.findings = [each._replace(layer=name) for each in report.findings]
    report.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_an_error_is_escaped_too(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("inspect", "a\n::error::b\x1b[2J.keras")
    err = capsys.readouterr().err
    assert err == (
        "keras-bn inspect: error: there is no file a\\n::error::b\\x1b[2J.keras\n"
    )


def test_select_exit_zero_and_quiet(folder, capsys):
    save("bias.keras", ["bn"])
    assert run("check", "bias.keras") == 1
    assert "never-updated" in capsys.readouterr().out
    assert run("check", "bias.keras", "--select", "BN010,frozen") == 0
    assert "never-updated" not in capsys.readouterr().out
    assert run("check", "bias.keras", "--exit-zero") == 0
    assert "never-updated" in capsys.readouterr().out
    assert run("check", "bias.keras", "gone.keras", "--exit-zero") == 2
    capsys.readouterr()
    assert run("check", "bias.keras", "--select", "frozen", "-q") == 0
    assert capsys.readouterr().out == ""
    with_data = ["bias.keras", "--data", "data.npz"]
    assert run("inspect", *with_data, "-q") == 1
    assert lines(capsys)[0] == "error   never-updated: bn (BN001)"
    assert run("inspect", *with_data, "--exit-zero", "--select", "BN001") == 0
    assert "train-inference-gap" not in capsys.readouterr().out
    assert (
        run("recalibrate", "bias.keras", "out.keras", "--data", "data.npz", "-q") == 0
    )
    assert run("fold", "out.keras", "small.keras", "-q") == 0
    assert run("convert", "out.keras", "ours.keras", "-q") == 0
    assert capsys.readouterr().out == ""
    assert "--select takes rules" in refused(capsys, "check", "a", "--select", "BN")


CONFIGURED = """
[project]
name = "mine"

[tool.keras-bn]
ignore = ["BN001"]
fail-on = "note"
format = "json"
"""


def test_configuration(folder, capsys, monkeypatch):
    (folder / "pyproject.toml").write_text(CONFIGURED)
    (folder / "inner").mkdir()
    monkeypatch.chdir(folder / "inner")
    assert run("check", "../many.keras") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["fail_on"] == "note"
    assert results["models"][0]["diagnosis"]["findings"] == []
    # The command line adds rules, and replaces the rest.
    assert run("check", "../many.keras", "--format", "text", "--ignore", "BN007") == 0
    assert "Ignored" not in capsys.readouterr().out
    (folder / "inner" / "pyproject.toml").write_text("[tool.other]\n")
    assert run("inspect", "../many.keras") == 0
    assert "error   never-updated" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import = ['os']", "[tool.keras-bn] takes batch-size, exit-zero, fail-on"),
        ("fail-on = 'never'", "fail-on must be one of error, warning, note, not 'nev"),
        ("ignore = 'BN001'", "ignore must be a list of rules, not 'BN001'"),
        ("ignore = ['BN999']", "--ignore takes rules"),
        ("exit-zero = 1", "exit-zero must be true or false, not 1"),
        ("steps = 0", "steps must be a whole number, 1 or greater, not 0"),
        ("steps = ", "is not valid TOML"),
    ],
)
def test_wrong_configuration(folder, capsys, line, words):
    (folder / "pyproject.toml").write_text(f"[tool.keras-bn]\n{line}\n")
    assert words in refused(capsys, "check", "many.keras")


@pytest.mark.parametrize(
    "table",
    [
        "[tool]\nkeras-bn.fail-on = 'never'",
        "[tool]\nkeras-bn = {fail-on = 'never'}",
        "tool.keras-bn.fail-on = 'never'",
        "[ tool . 'keras-bn' ] # ours\nfail-on = 'never'",
    ],
)
def test_toml_has_several_ways_to_write_a_table(folder, capsys, table):
    (folder / "pyproject.toml").write_text(table)
    assert "fail-on must be one of" in refused(capsys, "check", "many.keras")
    (folder / "pyproject.toml").write_text("[[tool.keras-bn]]")
    assert "must be a table" in refused(capsys, "check", "many.keras")


@pytest.mark.parametrize(
    "other",
    [
        b"# [tool.keras-bn] may come\n",
        b"# \xff\n",
        b'text = """\n[tool.keras-bn]\n"""',
        b'dependencies = ["keras-bn"',
    ],
)
def test_what_is_no_configuration(folder, capsys, monkeypatch, other):
    (folder / "pyproject.toml").write_text(CONFIGURED)
    (folder / "inner").mkdir()
    (folder / "inner" / "pyproject.toml").write_bytes(other)
    monkeypatch.chdir(folder / "inner")
    assert run("check", "../many.keras") == 0
    assert json.loads(capsys.readouterr().out)["fail_on"] == "note"


def test_rules_have_a_text(capsys):
    assert run("rule", "BN004", "frozen") == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "BN004 momentum-too-slow\n\n    Needs data. Warning. After `t`"
    )
    assert "BN008 frozen\n\n    Note. " in out
    assert run("rule") == 0
    every = capsys.readouterr().out
    for rule in RULES.values():
        assert f"{rule.id} {rule.kind}\n" in every
        assert len(rule.text) > 40
        assert rule.needs_data == rule.text.startswith("Needs data")
    assert "error: it takes rules: BN001 to BN0" in refused(capsys, "rule", "BN999")


def test_the_texts_of_the_rules_are_those_of_the_docs():
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    section = page[page.index("### BN001") :].partition("\n## ")[0]
    text = (ROOT / "keras_bn" / "diagnosis" / "rules.md").read_text(encoding="utf-8")
    assert text.strip() == section.strip(), "the section has to be copied"


def test_the_hook_for_pre_commit_is_a_command():
    hook = (ROOT / ".pre-commit-hooks.yaml").read_text()
    (entry,) = [line for line in hook.splitlines() if "entry: " in line]
    command = entry.partition("entry: keras-bn ")[2].split()
    assert parser().parse_args([*command, "a.keras", "b.h5"]).models == [
        "a.keras",
        "b.h5",
    ]


ENDED = """
import os, signal
import keras

class Slow(keras.layers.Layer):
    def get_config(self):
        if os.environ.get("DURING") == "save":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().get_config()

    @classmethod
    def from_config(cls, config):
        if os.environ.get("DURING") == "load":
            os.kill(os.getpid(), signal.SIGTERM)
        return cls(**config)

    def call(self, x):
        return x
"""


@pytest.mark.slow
@pytest.mark.parametrize("during", ["load", "save"])
def test_a_command_that_is_ended_leaves_nothing(folder, during):
    (folder / "my_slow.py").write_text(ENDED)
    (folder / "tmp").mkdir()
    make = (
        "import keras, my_slow\nkeras.Sequential([keras.Input((3,)), my_slow.Slow(), "
        "keras.layers.BatchNormalization()]).save('in.keras')"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    subprocess.run([sys.executable, "-c", make], env=environment, check=True)
    there = sorted(folder.iterdir())
    script = (
        "import sys\nsys.path.remove('')\n"
        "from keras_bn.cli.main import main\nraise SystemExit(main())"
    )
    command = ["convert", "in.keras", "out.keras", "--import", "my_slow"]
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DURING": during,
            "TMPDIR": str(folder / "tmp"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert not list((folder / "tmp").iterdir())
    assert [p for p in sorted(folder.iterdir()) if p.name != "__pycache__"] == [
        p for p in there if p.name != "__pycache__"
    ]


def test_the_current_folder_is_not_searched_first(folder, monkeypatch):
    """Nor at all once the module is imported."""
    (folder / "my_module.py").write_text("import my_neighbour, wave\n")
    (folder / "my_neighbour.py").write_text("")
    (folder / "wave.py").write_text("raise AssertionError('run from here')")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    before = list(sys.path)
    with imported(["my_module"]):
        assert sys.path == before
        assert "my_neighbour" in sys.modules


def process(*arguments, code="raise SystemExit(main())", **options):
    """Run the command line in a process of its own."""
    script = f"from keras_bn.cli.main import main\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    options = {"text": True, "check": False, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
@pytest.mark.parametrize("arguments", [["rule"], ["check", "gone.keras"]], ids=str)
def test_a_pipe_that_is_closed_ends_a_command(folder, arguments):
    read, write = os.pipe()
    os.close(read)
    done = process(*arguments, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="it is Linux's")
def test_what_cannot_be_printed_ends_with_a_sentence(folder):
    with open("/dev/full", "w") as full:
        done = process("rule", stdout=full)
    assert done.returncode == 2
    assert done.stderr == (
        "keras-bn rule: error: stdout can't be written: no space left on device\n"
    )


def test_what_stdout_cannot_encode_is_escaped(folder):
    ascii_only = {"env": {"PYTHONIOENCODING": "ascii"}, "stdout": subprocess.PIPE}
    done = process("check", "d\u00e9j\u00e0.keras", **ascii_only)
    assert done.returncode == 2
    assert "there is no file d\\xe9j\\xe0.keras" in done.stdout
