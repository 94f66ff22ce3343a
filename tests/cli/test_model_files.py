"""The commands that change model files: what they print, write and refuse."""

import itertools
import json
import pathlib
import shutil

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from support import classes
from support.backend import NAME, array, but_on, only
from support.command_line import refused, run
from support.zoo import convolutional, inputs_of, masked, randomized, several

import keras_bn
from keras_bn.cli import models
from keras_bn.surgery.graph import walk
from keras_bn.surgery.norms import is_keras, is_ours

EXPORTS = only("tensorflow", "its converter makes the file")


def count(path):
    model = keras.saving.load_model(path)
    found = [layer for _, layer in walk(model)]
    return sum(map(is_keras, found)), sum(map(is_ours, found))


@pytest.fixture
def saved(tmp_path):
    model = randomized(convolutional())
    model.save(tmp_path / "in.keras")
    return model


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_convert_there_and_back(saved, tmp_path, capsys, suffix):
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.keras"
    assert run("convert", tmp_path / "in.keras", there) == 0
    assert "3 converted to keras_bn" in capsys.readouterr().out
    assert count(there) == (0, 3)
    assert run("convert", there, back, "--to", "keras") == 0
    assert count(back) == (3, 0)
    x = inputs_of(saved)
    again = keras.saving.load_model(back)
    np.testing.assert_array_equal(array(again(x)), array(saved(x)))
    assert not list(tmp_path.glob(".*"))


def test_fold(tmp_path, capsys):
    stack = [layers.Dense(4), layers.BatchNormalization(name="first"), layers.ReLU()]
    last = layers.BatchNormalization(name="last"), layers.ReLU()
    saved = randomized(keras.Sequential([keras.Input((6,)), *stack, *last]))
    saved.save(tmp_path / "in.keras")
    out = tmp_path / "out.keras"
    assert run("fold", tmp_path / "in.keras", out, "--json", "-") == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert set(results["folded"]) == {"first"}
    assert set(results["stays"]) == {"last"}
    assert 0 < results["relative_difference"] < 1e-5
    assert "1 of 2 folded" in captured.err
    # What stays is Keras's again, so that the file opens where the other did.
    assert count(out) == (1, 0)
    x = inputs_of(saved)
    folded = keras.saving.load_model(out)
    np.testing.assert_allclose(array(folded(x)), array(saved(x)), rtol=1e-4, atol=1e-5)


@keras.saving.register_keras_serializable("keras_bn_tests")
class Counts(layers.Layer):
    """Gives other outputs at each call, as if folding had gone wrong."""

    calls = itertools.count()

    def call(self, inputs):
        return inputs + next(self.calls)


def test_fold_writes_nothing_that_computes_something_else(tmp_path, capsys):
    stack = [layers.Dense(4), layers.BatchNormalization(), Counts()]
    keras.Sequential([keras.Input((6,)), *stack]).save(tmp_path / "in.keras")
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


@EXPORTS
def test_export_int8(saved, tmp_path, capsys):
    in_, out, data = (tmp_path / n for n in ("in.keras", "out.tflite", "data.npz"))
    np.savez(data, x=inputs_of(saved, 20))
    arguments = in_, out, "--data", data
    assert run("export-int8", *arguments, "--json", tmp_path / "j.json") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "DEPTHWISE_CONV_2D" in printed
    assert "on 20 samples" in printed
    record = json.loads((tmp_path / "j.json").read_text())
    assert 1e-4 < record["error"] < 0.1
    assert record["layers"][0]["error"] >= record["layers"][-1]["error"]
    assert record["bytes"] == out.stat().st_size
    assert "--force" in refused(capsys, "export-int8", *arguments)
    for options in (
        ("--equalize", "--no-correct-bias"),
        ("--activations", "16", "--keep-float", "*"),
    ):
        assert run("export-int8", *arguments, "--force", *options) == 0
    assert not list(tmp_path.glob(".*"))


@EXPORTS
@pytest.mark.parametrize("options", [[], ["--symmetric"]])
def test_export_int8_to_onnx(saved, tmp_path, options):
    for package in "tf2onnx", "onnxruntime":
        pytest.importorskip(package)
    in_, out, data = (tmp_path / n for n in ("in.keras", "out.onnx", "data.npz"))
    np.savez(data, x=inputs_of(saved, 20))
    assert run("export-int8", in_, out, "--data", data, *options) == 0
    integers = b"int8 0" if options else b"uint8 0"  # a zero point
    assert integers in out.read_bytes()


@EXPORTS
def test_export_int8_writes_nothing_beyond_the_tolerance(saved, tmp_path, capsys):
    in_, out, data = (tmp_path / n for n in ("in.keras", "out.tflite", "data.npz"))
    np.savez(data, x=inputs_of(saved, 20))
    arguments = in_, out, "--data", data, "--tolerance", 1e-6
    assert run("export-int8", *arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "nothing written" in printed
    assert "Try samples in --data" in printed
    assert "--equalize; --lose X, with labels in --data; --activations 16" in printed
    assert not out.exists()


@EXPORTS
def test_export_int8_keeps_layers_in_floats(saved, tmp_path, capsys):
    in_, out, data = (tmp_path / n for n in ("in.keras", "out.tflite", "data.npz"))
    x = inputs_of(saved, 20)
    arguments = in_, out, "--data", data, "--json", tmp_path / "j.json"
    np.savez(data, x=x)
    assert run("export-int8", *arguments, "--keep-float", "*dense*") == 0
    assert "in floats: " in capsys.readouterr().out
    floats = json.loads((tmp_path / "j.json").read_text())["floats"]
    assert floats
    message = refused(capsys, "export-int8", *arguments, "--force", "--lose", "0.1")
    assert "`--lose` needs labels: give them in `--data DATA`, as y." in message
    y = saved.predict(x, verbose=0)
    np.savez(data, x=x, y=y.argmax(-1))
    assert run("export-int8", *arguments, "--force", "--lose", "0.5") == 0
    assert "metric: 1 in floats" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "j.json").read_text())["scores"]["float"] == 1.0
    np.savez(data, x=x, y=np.ones((20, 7)))
    message = refused(capsys, "export-int8", *arguments, "--force", "--lose", "0.5")
    assert "Call `keras_bn.export_int8` with another `metric`: " in message
    message = refused(
        capsys, "export-int8", *arguments, "--force", "--keep-float", "gone"
    )
    assert "`--keep-float` names 'gone'" in message


@EXPORTS
def test_export_int8_refuses(saved, tmp_path, capsys):
    in_, out, data = (tmp_path / n for n in ("in.keras", "out.tflite", "data.npz"))
    np.savez(data, x=inputs_of(saved, 20))
    message = refused(capsys, "export-int8", in_, tmp_path / "out.keras")
    assert "must end in .tflite" in message
    message = refused(capsys, "export-int8", in_, out)
    assert "Give `--data DATA`" in message
    stack = [keras.Input((12, 12, 3)), layers.LayerNormalization(name="norm")]
    keras.Sequential(stack).save(tmp_path / "norm.keras")
    message = refused(
        capsys, "export-int8", tmp_path / "norm.keras", out, "--data", data
    )
    assert "'norm'" in message
    assert not out.exists()


@but_on("tensorflow", "it exports there")
def test_export_int8_says_what_it_needs(capsys, tmp_path):
    (tmp_path / "in.keras").touch()
    files = tmp_path / "in.keras", tmp_path / "out.tflite"
    message = refused(capsys, "export-int8", *files)
    assert "error: `export-int8` needs Keras's TensorFlow backend" in message
    assert "with KERAS_BACKEND=tensorflow" in message
    assert message.endswith(f"The backend is {NAME!r}.")


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
    assert count(out) == (0, 0)
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
    assert count(tmp_path / "out.keras") == (0, 0)


def test_a_frozen_model_goes_to_keras_with_a_note(tmp_path, capsys):
    model = randomized(convolutional(keras_bn.BatchNormalization))
    keras_bn.freeze(model, fuse=True)
    model.save(tmp_path / "in.keras")
    files = tmp_path / "in.keras", tmp_path / "out.keras"
    assert run("convert", *files, "--to", "keras") == 0
    assert "no longer train in 'first', 'second'" in capsys.readouterr().out
    loaded = keras.saving.load_model(tmp_path / "out.keras")
    assert not any(la.trainable for _, la in walk(loaded) if is_keras(la))
    x = inputs_of(model)
    rounding = 0 if NAME == "tensorflow" else 1e-6
    np.testing.assert_allclose(array(loaded(x)), array(model(x)), rounding, rounding)


def test_models_with_integer_input_are_compared(tmp_path, capsys):
    randomized(masked()).save(tmp_path / "in.keras")
    assert run("fold", tmp_path / "in.keras", tmp_path / "out.keras") == 0
    assert "largest difference" in capsys.readouterr().out


@keras.saving.register_keras_serializable(package="keras_bn_tests")
class Idle(keras.Model):
    """Has a normalization that it never calls."""

    def __init__(self, ours=False, **kwargs):
        super().__init__(**kwargs)
        make = keras_bn.BatchNormalization if ours else layers.BatchNormalization
        self.dense, self.norm = layers.Dense(2), make(name="norm")

    def call(self, inputs):
        return self.dense(inputs)


def idle():
    model = Idle(name="m")
    model(np.ones((2, 3), "float32"))
    return model


def idle_inside():
    image = keras.Input((3,))
    inner = Idle(name="inner")
    return keras.Model(image, layers.BatchNormalization()(inner(image)), name="m")


def idle_of_ours():
    model = Idle(ours=True, name="m")
    model(np.ones((2, 3), "float32"))
    return model


@pytest.mark.parametrize("command", ["inspect", "convert", "fold"])
@pytest.mark.parametrize("make", [idle, idle_inside, idle_of_ours])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_normalizations_that_are_not_built(tmp_path, capsys, make, command):
    make().save(tmp_path / "in.keras")
    outputs = [] if command == "inspect" else [tmp_path / "out.keras"]
    message = refused(capsys, command, tmp_path / "in.keras", *outputs)
    assert "is not built, so it has no statistics yet" in message
    assert not (tmp_path / "out.keras").exists()


def test_a_file_of_weights_is_named_as_the_user_does(saved, tmp_path, capsys):
    saved.save_weights(tmp_path / "in.weights.h5")
    with h5py.File(tmp_path / "bare.h5", "w") as file:
        file["a"] = 1.0
    shutil.copyfile(tmp_path / "in.weights.h5", tmp_path / "renamed.keras")
    for name in ("in.weights.h5", "bare.h5", "renamed.keras"):
        message = refused(capsys, "inspect", tmp_path / name)
        assert f"{tmp_path / name} holds weights and no model" in message


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("command", ["convert", "fold", "recalibrate"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (NotImplementedError("No config."), "No config."),
    ],
)
def test_a_model_that_cannot_be_written(
    saved, tmp_path, capsys, monkeypatch, command, suffix, error, reason
):
    def save(model, path, **options):
        path.write_text("half of it")
        raise error

    np.savez(tmp_path / "data.npz", x=inputs_of(saved, 20))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(keras.Model, "save", save)
    data = ["--data", tmp_path / "data.npz"] if command == "recalibrate" else []
    out = tmp_path / f"out{suffix}"
    message = refused(capsys, command, tmp_path / "in.keras", out, *data)
    assert message.endswith(f"{out} can't be written: {reason}")
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_cannot_go_back_to_keras(saved, tmp_path, capsys, monkeypatch):
    def to_keras(model):
        raise ValueError("Cannot copy 'dense': no config.")

    monkeypatch.setattr(models, "to_keras", to_keras)
    message = refused(capsys, "fold", tmp_path / "in.keras", tmp_path / "out.keras")
    assert message.endswith("Cannot copy 'dense': no config.")
    assert not (tmp_path / "out.keras").exists()


@pytest.mark.parametrize("command", ["inspect", "convert", "fold"])
def test_json_that_cannot_be_written(saved, tmp_path, capsys, monkeypatch, command):
    def full(path, text, **options):
        raise OSError(28, "No space left")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    outputs = [] if command == "inspect" else [tmp_path / "out.keras"]
    file = tmp_path / "a.json"
    message = refused(capsys, command, tmp_path / "in.keras", *outputs, "--json", file)
    assert message.endswith(f"{file} can't be written: No space left")
    assert not file.exists()


def test_json_of_lost_statistics_is_json(saved, tmp_path, capsys):
    saved.get_layer("first").moving_mean.assign([np.nan] * 4)
    saved.save(tmp_path / "in.keras")
    np.savez(tmp_path / "data.npz", x=inputs_of(saved, 20))
    data = ["--data", tmp_path / "data.npz", "--json", tmp_path / "a.json"]
    assert run("recalibrate", tmp_path / "in.keras", tmp_path / "out.keras", *data) == 0

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "a.json").read_text()
    [first, *_] = json.loads(text, parse_constant=refuse)["layers"]
    assert (first["layer"], first["mean_moved"]) == ("first", None)


def test_a_model_that_is_frozen_throughout(saved, tmp_path, capsys):
    for layer in saved.layers:
        layer.trainable = False
    saved.save(tmp_path / "in.keras")
    np.savez(tmp_path / "data.npz", x=inputs_of(saved, 20))
    arguments = [tmp_path / "in.keras", tmp_path / "out.keras"]
    arguments += ["--data", tmp_path / "data.npz"]
    assert "--include-frozen changes" in refused(capsys, "recalibrate", *arguments)
    assert run("recalibrate", *arguments, "--include-frozen") == 0


WRONG_NUMBERS = [("--batch-size", 0), ("--batch-size", 1.5), ("--prior", -1)]


@pytest.mark.parametrize(("option", "value"), [*WRONG_NUMBERS, ("--prior", "nan")])
def test_numbers_out_of_range_are_refused(saved, tmp_path, capsys, option, value):
    arguments = [tmp_path / "in.keras", tmp_path / "out.keras", "--data", "a.npz"]
    message = refused(capsys, "recalibrate", *arguments, option, value)
    assert f"argument {option}: must be a" in message
    assert f"or greater, not '{value}'" in message


def test_a_model_that_takes_no_random_input_is_not_compared(tmp_path, capsys):
    image = keras.Input((None,), name="x")
    x = layers.Dense(4)(layers.Reshape((-1, 7))(image))
    x = layers.GlobalAveragePooling1D()(layers.BatchNormalization()(x))
    keras.Model(image, x).save(tmp_path / "in.keras")
    assert run("fold", tmp_path / "in.keras", tmp_path / "out.keras") == 0
    assert "not compared: " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "convert", "fold", "recalibrate"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as raised:
        run(command, "--help")
    assert raised.value.code == 0
    assert "model" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fold", "convert", "recalibrate"])
@pytest.mark.parametrize("make", [classes.Net, classes.task, classes.with_a_block])
def test_a_class_that_makes_its_own_layers(make, command, tmp_path, capsys):
    model = randomized(make())
    model.save(tmp_path / "in.keras")
    out = tmp_path / "out.keras"
    x = np.random.default_rng(0).normal(size=(64, 6, 3)).astype("float32")
    np.savez(tmp_path / "data.npz", x=x)
    data = ["--data", tmp_path / "data.npz"] if command == "recalibrate" else []
    assert run(command, tmp_path / "in.keras", out, *data) == 0
    printed = capsys.readouterr().out
    loaded = keras_bn.load_model(out)
    if command == "convert":
        assert "which makes its own: `keras_bn.load_model` loads it" in printed
    if command != "recalibrate":
        for again in (loaded, keras.saving.load_model(out)):
            np.testing.assert_allclose(
                array(again(x)), array(model(x)), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_file_that_does_not_load_again_is_not_written(suffix, tmp_path, capsys):
    """A class whose config does not say how it was made; and one that was frozen."""

    class Forgetful(classes.Net):
        grows = None

        def get_config(self):
            return {} if self.grows is None else {"units": self.units + self.grows}

    path, out = tmp_path / "in.keras", tmp_path / f"out{suffix}"
    with keras.saving.custom_object_scope({"Forgetful": Forgetful}):
        model = randomized(keras_bn.from_keras(Forgetful(units=4)))
        keras_bn.freeze(model)
        model.save(path)
        if suffix == ".h5":
            message = refused(capsys, "convert", path, out)
            assert "does not keep freeze_statistics of 'bn'" in message
        else:
            assert run("convert", path, out) == 0
            out.unlink()
            Forgetful.grows = 1
            message = refused(capsys, "convert", path, out)
            assert "could not be loaded again" in message
        assert not out.exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.keras"]
