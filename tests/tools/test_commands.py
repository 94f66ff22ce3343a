"""The commands that change model files: what they print, write and refuse."""

import json

import keras
import numpy as np
import pytest
from zoo import convolutional, inputs_of, masked, randomized, several

import keras_bn
from keras_bn import cli
from keras_bn.tools.convert import is_keras, is_ours
from keras_bn.tools.graph import walk


def count(path):
    model = keras.saving.load_model(path)
    found = [layer for _, layer in walk(model)]
    return sum(map(is_keras, found)), sum(map(is_ours, found))


@pytest.fixture
def saved(tmp_path):
    model = randomized(convolutional())
    model.save(tmp_path / "in.keras")
    return model


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_convert_there_and_back(saved, tmp_path, capsys, suffix):
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.keras"
    assert run("convert", tmp_path / "in.keras", there) == 0
    assert "3 converted to keras_bn" in capsys.readouterr().out
    assert count(there) == (0, 3)
    assert run("convert", there, back, "--to", "keras") == 0
    assert count(back) == (3, 0)
    x = inputs_of(saved)
    np.testing.assert_array_equal(keras.saving.load_model(back)(x), saved(x))
    assert not list(tmp_path.glob(".*"))


def test_fold(saved, tmp_path, capsys):
    out = tmp_path / "out.keras"
    assert run("fold", tmp_path / "in.keras", out, "--json", "-") == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert set(results["folded"]) == {"first", "second"}
    assert set(results["stays"]) == {"after_add"}
    assert 0 < results["relative_difference"] < 1e-5
    assert "2 of 3 folded" in captured.err
    # What stays is Keras's again, so that the file opens where the other did.
    assert count(out) == (1, 0)
    x = inputs_of(saved)
    np.testing.assert_allclose(
        keras.saving.load_model(out)(x), saved(x), rtol=1e-4, atol=1e-5
    )


def test_fold_writes_nothing_that_computes_something_else(
    saved, tmp_path, capsys, monkeypatch
):
    from keras_bn.tools import fold

    def wrong(model):
        folded = keras_bn.fold(model)
        folded.layers[-1].bias.assign(folded.layers[-1].bias + 1.0)
        return folded

    monkeypatch.setattr(fold, "fold", wrong)
    assert run("fold", tmp_path / "in.keras", tmp_path / "out.keras") == 1
    assert "nothing written" in capsys.readouterr().out
    assert not (tmp_path / "out.keras").exists()


def test_recalibrate(saved, tmp_path, capsys):
    x = inputs_of(saved, 20)
    np.savez(tmp_path / "data.npz", x=x, y=np.zeros(20))
    arguments = ["--data", tmp_path / "data.npz", "--batch-size", 8]
    in_, out = tmp_path / "in.keras", tmp_path / "out.keras"
    assert run("recalibrate", in_, out, *arguments, "--json", tmp_path / "j.json") == 0
    assert "3 of 3 recalibrated" in capsys.readouterr().out
    records = json.loads((tmp_path / "j.json").read_text())["layers"]
    assert records[0] == {
        **records[0],
        "layer": "first",
        "elements": 20 * 12 * 12,
    }
    assert records[0]["mean_moved"] > 0.1
    keras_bn.recalibrate(saved, x, batch_size=8, verbose=0)
    after = keras.saving.load_model(out)
    for a, b in zip(after.variables, saved.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6)
    assert count(out) == (3, 0)
    options = ["--exact", "--prior", 10, "--force"]
    assert run("recalibrate", in_, out, *arguments, *options) == 0


def test_data_for_several_inputs(tmp_path, capsys):
    model = randomized(several())
    model.save(tmp_path / "in.keras")
    data = tmp_path / "data.npz"
    np.savez(data, **inputs_of(model, 10))
    out = tmp_path / "out.keras"
    assert run("recalibrate", tmp_path / "in.keras", out, "--data", data) == 0
    assert "fewer than 100" in " ".join(capsys.readouterr().out.split())
    np.savez(data, a=np.zeros((10, 6)))
    message = refused(
        capsys, "recalibrate", tmp_path / "in.keras", out, "--data", data, "--force"
    )
    assert "lacks an array for the input b" in message


def test_refusals(saved, tmp_path, capsys):
    in_, out = tmp_path / "in.keras", tmp_path / "out.keras"
    assert "no file" in refused(capsys, "inspect", tmp_path / "gone.keras")
    (tmp_path / "text.keras").write_text("hello")
    assert "not a Keras model" in refused(capsys, "inspect", tmp_path / "text.keras")
    out.write_text("precious")
    for command in "convert", "fold":
        assert "--force" in refused(capsys, command, in_, out)
    assert out.read_text() == "precious"
    assert run("fold", in_, out, "--force") == 0
    assert count(out) == (1, 0)
    assert "must end in .keras" in refused(capsys, "fold", in_, tmp_path / "out.txt")
    assert "no folder" in refused(capsys, "fold", in_, tmp_path / "no" / "out.keras")
    data = tmp_path / "data.npz"
    data.write_text("no arrays")
    arguments = in_, tmp_path / "new.keras", "--data", data
    assert "can't be read" in refused(capsys, "recalibrate", *arguments)
    np.savez(data, a=np.zeros(3), b=np.zeros(3))
    assert "must hold one array" in refused(capsys, "recalibrate", *arguments)


def test_unsafe_files_are_refused(tmp_path, capsys):
    layers = [keras.Input((3,)), keras.layers.Lambda(lambda x: x + 1)]
    keras.Sequential(layers).save(tmp_path / "unsafe.keras")
    assert "safe" in refused(capsys, "inspect", tmp_path / "unsafe.keras")


def test_a_model_without_any(tmp_path):
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain").save(
        tmp_path / "plain.keras"
    )
    with pytest.raises(
        SystemExit, match="'plain' has no batch normalization"
    ) as raised:
        run("inspect", tmp_path / "plain.keras")
    assert isinstance(raised.value.code, str)  # which Python exits with as status 1


def test_options_that_keras_lacks(tmp_path, capsys):
    model = convolutional(lambda **o: keras_bn.BatchNormalization(unbiased=True, **o))
    model.save(tmp_path / "in.keras")
    arguments = tmp_path / "in.keras", tmp_path / "out.keras"
    message = refused(capsys, "convert", *arguments, "--to", "keras")
    assert "unbiased=True" in message
    assert run("fold", *arguments) == 0
    assert count(tmp_path / "out.keras") == (0, 1)


def test_models_with_integer_input_are_compared(tmp_path, capsys):
    randomized(masked()).save(tmp_path / "in.keras")
    assert run("fold", tmp_path / "in.keras", tmp_path / "out.keras") == 0
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "convert", "fold", "recalibrate"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as raised:
        run(command, "--help")
    assert raised.value.code == 0
    assert "model" in capsys.readouterr().out
