"""`keras-bn inspect`: what it lists, finds, writes, refuses, and its status."""

import json
import re
import shlex

import keras
import numpy as np
import pytest
from keras import layers
from support import command_line
from support.backend import but_on

import keras_bn
from keras_bn.diagnosis import report


def run(*arguments):
    return command_line.run("inspect", *arguments)


def refused(capsys, *arguments):
    return command_line.refused(capsys, "inspect", *arguments)


def data(n=200):
    rng = np.random.default_rng(0)
    x = rng.normal(5.0, 2.0, (n, 4)).astype("float32")
    return x, (x[:, 0] > 5).astype("int64")


@pytest.fixture
def model():
    model = keras.Sequential(
        [
            keras.Input((4,), name="image"),
            layers.Dense(6, use_bias=False, name="dense"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(),
            layers.Dense(2, activation="softmax", name="head"),
        ],
        name="model",
    )
    rng = np.random.default_rng(1)  # not Keras's: each backend draws other numbers
    for name in ("dense", "head"):
        layer = model.get_layer(name)
        drawn = [rng.normal(0, 0.7, weight.shape) for weight in layer.get_weights()]
        layer.set_weights(drawn)
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


@pytest.fixture
def files(model, tmp_path):
    model.save(tmp_path / "model.keras")
    x, y = data()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path / "model.keras", tmp_path / "data.npz"


def test_without_data_it_lists(files, tmp_path, capsys):
    assert run(files[0], "--json", tmp_path / "a.json") == 0
    out = capsys.readouterr().out
    for word in ("bn", "never updated", "dense", "0.99", "0.001"):
        assert word in out
    results = json.loads((tmp_path / "a.json").read_text())
    assert results["layers"] == [
        {
            "layer": "bn",
            "class": "keras.layers.BatchNormalization",
            "channels": 6,
            "axis": -1,
            "momentum": 0.99,
            "epsilon": 0.001,
            "state": "never updated",
            "fold_into": "dense",
            "stays": results["layers"][0]["stays"],
        }
    ]
    assert "error never-updated: bn (BN001)" in " ".join(out.split())
    assert "that needs data: momentum-too-slow, stale-statistics" in out
    found = results["diagnosis"]
    assert [each["rule"] for each in found["findings"]] == ["BN001"]
    assert (found["samples"], found["output_gap"]) == (0, None)


def test_the_momentum_of_a_schedule_is_that_of_now(tmp_path, capsys):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    norm = keras_bn.BatchNormalization(momentum=schedule, name="bn")
    model = keras.Sequential([keras.Input((4,)), norm])
    model.compile("sgd", "mse")
    model.fit(*[np.ones((64, 4))] * 2, batch_size=32, verbose=0)
    model.save(tmp_path / "model.keras")
    assert run(tmp_path / "model.keras", "--json", tmp_path / "a.json") == 0
    assert "  0.125  " in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "a.json").read_text())["layers"]
    assert record["momentum"] == 0.125


def test_a_sick_model(files, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="it draws the figure")
    page, figure = tmp_path / "a.html", tmp_path / "a.png"
    json_file = tmp_path / "a.json"
    outputs = ["--html", page, "--plot", figure, "--json", json_file]
    assert run(files[0], "--data", files[1], *outputs) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "error never-updated: bn" in out
    assert "-> keras_bn.recalibrate(model, x)" in out
    assert f"keras-bn recalibrate {files[0]} OUT.keras --data {files[1]}" in out
    assert "never-updated" in page.read_text(encoding="utf-8")
    assert figure.read_bytes().startswith(b"\x89PNG")
    diagnosis = json.loads(json_file.read_text())["diagnosis"]
    assert diagnosis["samples"] == 200
    assert diagnosis["loss"]["inference"] > diagnosis["loss"]["training"]
    assert not list(tmp_path.glob(".*"))


def test_a_healthy_model_after_the_remedy(files, tmp_path, capsys):
    mended = tmp_path / "mended.keras"
    arguments = [files[0], mended, "--data", files[1]]
    assert command_line.run("recalibrate", *arguments) == 0
    assert run(mended, "--data", files[1]) == 0
    assert "No problems found." in capsys.readouterr().out


def test_the_findings_are_those_of_diagnose(model, files, tmp_path):
    """On shuffled samples: the file's order is not the training's."""
    x, y = data()
    order = np.argsort(y, kind="stable")
    np.savez(files[1], x=x[order], y=y[order])
    keras_bn.recalibrate(model, x, verbose=0)
    model.save(files[0])
    options = ["--json", tmp_path / "a.json", "--batch-size", 64]
    assert run(files[0], "--data", files[1], *options) == 0
    results = json.loads((tmp_path / "a.json").read_text())
    assert results["diagnosis"]["batches"] == 4
    assert results["diagnosis"]["findings"] == []


def test_samples_in_an_order_are_shuffled(model, files):
    """In this order a batch has the statistics of a part of the data."""
    x = np.sort(data()[0], axis=0)
    keras_bn.recalibrate(model, x, batch_size=200, verbose=0)
    assert not keras_bn.diagnose(model, x).healthy
    model.save(files[0])
    np.savez(files[1], x=x)
    assert run(files[0], "--data", files[1]) == 0


def test_a_sample_that_is_not_finite_is_named_as_in_the_file(files, capsys):
    x, y = data()
    x[[5, 90]] = np.nan
    np.savez(files[1], x=x, y=y)
    assert run(files[0], "--data", files[1]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of 200 samples" in out
    assert "first is sample 5." in out


def test_keras_layers_are_diagnosed_as_such(model, files, capsys):
    model.get_layer("bn").moving_mean.assign(np.full(6, np.nan))
    model.save(files[0])
    assert run(files[0], "--data", files[1]) == 1
    assert "from_keras(model)" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_layers_of_both_libraries_are_told_apart(tmp_path, capsys, suffix):
    norms = [layers.BatchNormalization(name="a"), keras_bn.BatchNormalization(name="b")]
    file = tmp_path / f"both{suffix}"
    keras.Sequential([keras.Input((4,)), *norms], name="both").save(file)
    assert run(file) == 0
    out = capsys.readouterr().out
    first, second = (re.split(" +", line) for line in out.splitlines()[4:6])
    assert first[:2] == ["a", "keras.layers.BatchNormalization"]
    assert second[:2] == ["b", "keras_bn.BatchNormalization"]
    assert "\n2 batch normalizations in both\n" in out


def state(files, tmp_path, *options):
    file = tmp_path / "state.json"
    status = run(files[0], "--json", file, "--force", *options)
    [layer] = json.loads(file.read_text())["layers"]
    return layer["state"], status


STATES = {
    "never updated": {},
    "non finite statistics": {"moving_mean": np.nan},
    "negative variance": {"moving_variance": -1.0},
}


@pytest.mark.parametrize("expected", STATES)
def test_the_state_is_known_without_data(model, files, tmp_path, expected):
    for name, value in STATES[expected].items():
        getattr(model.get_layer("bn"), name).assign(np.full(6, value))
    files = tmp_path / "lost.h5", files[1]
    model.save(files[0])
    assert state(files, tmp_path) == (expected, 0)
    found, status = state(files, tmp_path, "--data", files[1])
    assert found.split(", ")[0] == expected
    assert status == 1


def test_without_data_no_layer_is_called_healthy(model, files, tmp_path):
    model.get_layer("bn").moving_mean.assign(np.full(6, 50.0))
    model.save(files[0])
    assert state(files, tmp_path) == ("updated", 0)
    found = state(files, tmp_path, "--data", files[1])
    assert found == ("stale statistics", 1)


def test_a_frozen_layer_is_said_to_be(model, files, tmp_path):
    model.get_layer("bn").trainable = False
    model.save(files[0])
    assert state(files, tmp_path) == ("never updated, frozen", 0)
    found = state(files, tmp_path, "--data", files[1])
    assert found == ("never updated, frozen", 1)


def test_the_state_is_what_the_diagnosis_finds(model, files, tmp_path):
    keras_bn.recalibrate(model, data()[0], verbose=0)
    model.save(files[0])
    assert state(files, tmp_path, "--data", files[1]) == ("healthy", 0)
    small = ["--data", files[1], "--batch-size", 8]
    assert state(files, tmp_path, *small) == ("small batch", 1)
    model.get_layer("bn").gamma.assign(np.zeros(6))
    model.save(files[0])
    assert state(files, tmp_path, "--data", files[1]) == ("small gamma", 1)


def test_the_remedy_on_files_is_for_what_recalibration_mends(model, files, capsys):
    model.get_layer("bn").trainable = False
    model.save(files[0])
    run(files[0], "--data", files[1])
    command = f"recalibrate {files[0]} OUT.keras --data {files[1]} --include-frozen"
    assert f"-> keras-bn {command}\n" in capsys.readouterr().out
    keras_bn.recalibrate(model, data()[0], include_frozen=True, verbose=0)
    model.get_layer("bn").gamma.assign(np.zeros(6))
    model.save(files[0])
    assert run(files[0], "--data", files[1]) == 1
    assert "keras-bn recalibrate" not in capsys.readouterr().out


def test_the_command_reads_the_data_as_the_diagnosis_did(files, tmp_path, capsys):
    x, y = data()
    inputs = tmp_path / "named.npz"
    np.savez(inputs, images=x, digits=y, x=x[:, :1])
    run(
        *(files[0], "--data", inputs, "--x", "images", "--y", "digits"),
        *("--batch-size", 16, "--steps", 3),
    )
    out = capsys.readouterr().out
    (command,) = {line for line in out.splitlines() if "-> keras-bn recal" in line}
    words = shlex.split(command)[2:]
    words[words.index("OUT.keras")] = str(tmp_path / "out.keras")
    assert command_line.run(*words) == 0
    assert f"{16 * 3:,}" in capsys.readouterr().out


def tools(model):
    found = keras_bn.diagnose(model, data()[0]).findings
    return {finding.kind: finding.tool for finding in found}


def test_findings_name_the_tool(model):
    model.get_layer("bn").gamma.assign(np.zeros(6))
    named = tools(model)
    assert named["never-updated"] == "recalibrate"
    assert named["small-gamma"] is None
    ours = keras_bn.from_keras(model)
    keras_bn.freeze(ours)
    assert tools(ours)["frozen"] == "unfreeze"


def test_the_page_needs_no_data(files, tmp_path):
    page = tmp_path / "a.html"
    assert run(files[0], "--html", page) == 0
    text = page.read_text(encoding="utf-8")
    assert "never-updated" in text
    assert "no data" in text


def test_fix_writes_a_model_whose_statistics_are_those_of_the_data(
    model, files, tmp_path, capsys
):
    weights = model.get_layer("dense").get_weights() + model.get_layer("head").weights
    fixed, page, file = (tmp_path / name for name in ("b.keras", "b.html", "b.json"))
    arguments = [files[0], "--data", files[1], "--fix", fixed, "--html", page]
    assert run(*arguments, "--json", file) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Recalibrated 1 layer: bn." in out
    assert f"Written: {fixed}" in out
    assert "before and after" in page.read_text(encoding="utf-8")
    results = json.loads(file.read_text())["fix"]
    assert (results["file"], results["recalibrated"]) == (str(fixed), ["bn"])
    assert "never-updated" in [each["kind"] for each in results["gone"]]
    assert results["after"]["findings"] == []
    again = keras.saving.load_model(fixed)
    assert type(again.get_layer("bn")) is layers.BatchNormalization
    inputs = keras.ops.convert_to_numpy(again.get_layer("dense")(data()[0]))
    mean = keras.ops.convert_to_numpy(again.get_layer("bn").moving_mean)
    np.testing.assert_allclose(mean, inputs.mean(0), rtol=1e-4)
    after = again.get_layer("dense").get_weights() + again.get_layer("head").weights
    for first, second in zip(weights, after, strict=True):
        np.testing.assert_array_equal(first, second)


def test_fix_does_not_overwrite(files, tmp_path, capsys):
    fixed = tmp_path / "b.keras"
    fixed.write_text("precious")
    arguments = [files[0], "--data", files[1], "--fix", fixed]
    assert "--force" in refused(capsys, *arguments)
    assert fixed.read_text() == "precious"
    assert "must end in .keras" in refused(capsys, *arguments[:-1], tmp_path / "b.npz")


def test_a_fix_that_cannot_be_written_leaves_no_file(
    files, tmp_path, capsys, monkeypatch
):
    def full(self, path, *arguments, **options):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(keras.Model, "save", full)
    there, fixed = set(tmp_path.iterdir()), tmp_path / "b.keras"
    message = refused(capsys, files[0], "--data", files[1], "--fix", fixed)
    assert message.endswith(f"{fixed} can't be written: No space left on device")
    assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize("given", ["BN001,train-inference-gap", "BN001, BN011"])
def test_what_is_ignored_fails_nothing(files, capsys, given):
    assert run(files[0], "--data", files[1], "--ignore", given) == 0
    assert "Ignored: 1 never-updated (BN001), 1 train" in capsys.readouterr().out


def test_a_rule_that_is_none_is_refused_in_words(files, capsys):
    message = refused(capsys, files[0], "--ignore", "BN01")
    assert "--ignore" in message
    assert "'BN01'" in message


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_an_output_that_fails_ends_with_a_sentence(
    files, tmp_path, capsys, monkeypatch, option
):
    pytest.importorskip("matplotlib", reason="it draws the figure")

    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(report.Report, "to_html", full)
    monkeypatch.setattr(report.Report, "plot", full)
    out = tmp_path / {"--html": "a.html", "--plot": "a.png"}[option]
    message = refused(capsys, files[0], "--data", files[1], option, out)
    assert message.endswith(f"{out} can't be written: No space left on device")
    assert not out.exists()


def test_nothing_is_overwritten_without_force(files, tmp_path, capsys):
    page = tmp_path / "a.html"
    page.write_text("precious")
    arguments = [files[0], "--data", files[1], "--html", page]
    assert "--force" in refused(capsys, *arguments)
    assert page.read_text() == "precious"
    assert run(*arguments, "--force") == 1
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_outputs_that_cannot_be(files, tmp_path, capsys):
    data_file = files[1]
    assert "needs --data" in refused(capsys, files[0], "--plot", "a.png")
    assert "needs --data" in refused(capsys, files[0], "--fix", "a.keras")
    with_data = [files[0], "--data", data_file]
    assert "must end in .html" in refused(capsys, *with_data, "--html", "a.txt")
    assert "must end in .png" in refused(capsys, *with_data, "--plot", "a.html")
    missing = tmp_path / "no" / "a.html"
    assert "no folder" in refused(capsys, *with_data, "--html", missing)
    assert "1 or greater" in refused(capsys, *with_data, "--batch-size", 0)


WRONG = {
    "must hold one array, or one called x or x_train or image, not a, b": {
        "a": 1,
        "b": 2,
    },
    "must hold one array, or one called x or x_train or image, not none": {},
    "x in {file} has the shape (9, 5), and the model takes (None, 4)": {
        "x": np.zeros((9, 5))
    },
    "x in {file} has the shape (9,), and the model takes (None, 4)": {"x": np.zeros(9)},
    "x in {file} holds no numbers but <U1": {"x": np.full((9, 4), "a")},
    "x in {file} holds no samples": {"x": np.zeros((0, 4))},
    "{file} holds unequal numbers of samples: 9 in x, 8 in y": {
        "x": np.zeros((9, 4)),
        "y": np.zeros(8),
    },
    "x in {file} holds Python objects, not numbers": {"x": np.array([None, 1], object)},
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_contents_are_refused_in_words(files, capsys, said):
    np.savez(files[1], **WRONG[said])
    assert said.format(file=files[1]) in refused(capsys, files[0], "--data", files[1])


def test_what_is_no_npz_is_refused_in_words(files, tmp_path, capsys):
    with_data = [files[0], "--data"]
    cut = tmp_path / "cut.npz"
    cut.write_bytes(files[1].read_bytes()[:200])
    assert f"{cut} can't be read" in refused(capsys, *with_data, cut)
    cut.write_bytes(b"")
    assert f"{cut} can't be read" in refused(capsys, *with_data, cut)
    assert "no file" in refused(capsys, *with_data, tmp_path / "gone.npz")


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(
            np.full(200, 7), marks=but_on("jax", "it computes with any label")
        ),
        np.zeros((200, 3)),
    ],
    ids=["values", "shape"],
)
def test_labels_that_do_not_suit_are_refused_in_words(files, capsys, labels):
    np.savez(files[1], x=data()[0], y=labels)
    message = refused(capsys, files[0], "--data", files[1])
    assert f"the model can't be run on {files[1]}" in message


def test_the_name_of_the_input_will_do(files):
    x, y = data()
    np.savez(files[1], image=x, y=y)
    assert run(files[0], "--data", files[1]) == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as raised:
        run("--help")
    assert raised.value.code == 0
    assert "--html" in capsys.readouterr().out
