"""`--data`: every form that it takes, and what it says of others."""

import json
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from support.backend import only
from support.command_line import refused, run

import keras_bn


def samples(n=120):
    return np.random.default_rng(0).normal(5.0, 2.0, (n, 4)).astype("float32")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """`model.keras` in the current folder, healthy on `samples()` with labels."""
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.BatchNormalization(name="bn"),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    keras_bn.recalibrate(model, samples(), verbose=0)
    model.save("model.keras")
    return model


def counted(*options, command="inspect"):
    """How many samples a diagnosis of `model.keras` has seen, and its loss."""
    run(command, "model.keras", "--json", "a.json", "--force", *options)
    diagnosis = json.loads(Path("a.json").read_text())["diagnosis"]
    return diagnosis["samples"], diagnosis["loss"] is not None


ARRAYS = {
    "x": ({"x": samples()}, [], False),
    "x and y": ({"x": samples(), "y": np.ones(120, int)}, [], True),
    "as Keras's mnist.npz": (
        {
            "x_train": samples(),
            "y_train": np.ones(120, int),
            "x_test": samples(10),
            "y_test": np.ones(10, int),
        },
        [],
        True,
    ),
    "named": (
        {"images": samples(), "classes": np.ones(120, int), "more": np.ones(3)},
        ["--x", "images", "--y", "classes"],
        True,
    ),
    "one": ({"anything": samples()}, [], False),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays(model, form):
    arrays, options, labelled = ARRAYS[form]
    np.savez("data.npz", **arrays)
    assert counted("--data", "data.npz", *options) == (120, labelled)


def test_one_array(model):
    np.save("data.npy", samples())
    assert counted("--data", "data.npy") == (120, False)


def test_steps_end_a_pass(model, capsys):
    np.save("data.npy", samples())
    options = ["--data", "data.npy", "--batch-size", 8, "--steps", 3]
    assert counted(*options) == (24, False)
    assert run("recalibrate", "model.keras", "out.keras", *options) == 0
    assert "24" in capsys.readouterr().out


FUNCTIONS = """
import numpy as np

x = np.random.default_rng(0).normal(5.0, 2.0, (120, 4)).astype("float32")
y = np.ones(120, int)


def arrays():
    return x, y


def alone():
    return x


def generator():
    while True:
        yield x[:9], y[:9]


class Nested:
    make = staticmethod(arrays)


def loud():
    print("reading")
    return x, y


def nothing():
    pass


def broken():
    return x[1000]


number = 3
"""


@pytest.fixture
def functions(model, tmp_path):
    import sys

    (tmp_path / "my_data.py").write_text(FUNCTIONS)
    yield
    sys.modules.pop("my_data", None)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("arrays", [], (120, True)),
        ("alone", [], (120, False)),
        ("generator", ["--steps", 4], (36, True)),
        ("Nested.make", [], (120, True)),
    ],
)
def test_a_function(functions, name, options, expected):
    assert counted("--data", f"my_data:{name}", *options) == expected
    out = ["out.keras", "--data", f"my_data:{name}", *options]
    assert run("recalibrate", "model.keras", *out) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_data:nothing", "--data my_data:nothing returns None instead of data"),
        ("my_data:broken", "--data my_data:broken fails: IndexError: "),
        ("my_data:number", "--data my_data:number fails: "),
        ("my_data:gone", "--data my_data:gone: my_data has no gone"),
        ("my_gone:make", "--data my_gone: no module 'my_gone' is installed or in the"),
    ],
)
def test_functions_that_give_no_data(functions, capsys, name, words):
    assert words in refused(capsys, "inspect", "model.keras", "--data", name)


def test_what_a_function_prints_is_no_result(functions, capsys):
    run("inspect", "model.keras", "--data", "my_data:loud", "--json", "-")
    printed = capsys.readouterr()
    assert json.loads(printed.out)["diagnosis"]["samples"] == 120
    assert "reading" in printed.err


def test_a_folder_that_cannot_be_read(model, capsys, monkeypatch):
    os.mkdir("mine")
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = refused(capsys, "inspect", "model.keras", "--data", "mine")
    assert said.endswith("can't be read: permission denied")


@only("tensorflow", "tf.data is TensorFlow's")
@pytest.mark.parametrize("batched", [True, False])
def test_a_folder_of_tf_data(model, batched):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((samples(), np.ones(120, int)))
    (dataset.batch(9) if batched else dataset).save("saved")
    assert counted("--data", "saved") == (120, True)


@pytest.mark.parametrize(
    ("channels", "loss", "units"),
    [
        (3, "sparse_categorical_crossentropy", 2),
        (1, keras.losses.CategoricalCrossentropy(), 2),
        (3, "CategoricalFocalCrossentropy", 2),
        (3, "binary_crossentropy", 1),
    ],
)
def test_a_folder_of_images(tmp_path, monkeypatch, channels, loss, units):
    pytest.importorskip("tensorflow", reason="it reads the images")
    pytest.importorskip("PIL", reason="it writes the images")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            image = rng.integers(0, 255, (12, 10, 3))
            keras.utils.save_img(f"images/{name}/{i}.png", image, scale=False)
    model = keras.Sequential(
        [
            keras.Input((8, 6, channels)),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(units, activation="sigmoid"),
        ]
    )
    model.compile("adam", loss)
    model.save("model.keras")
    assert counted("--data", "images") == (10, True)
    assert counted("--data", "images/cats") == (5, False)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("gone.npz", "there is no file gone.npz; --data takes an .npz or .npy file, a"),
        ("text.txt", "--data text.txt is none of these; --data takes"),
        ("empty", "empty holds no images (.bmp, .gif, .jpeg, .jpg, .png), and is not"),
        ("pickled.npz", "pickled.npz can't be read: it is no .npz or .npy file, or"),
        ("objects.npz", "x in objects.npz holds Python objects, not numbers"),
        ("labels.npz", "the model can't be run on labels.npz: "),
    ],
)
def test_what_is_no_data(model, tmp_path, capsys, data, words):
    (tmp_path / "text.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled.npz").write_bytes(b"\x80\x04]\x94K\x01a.")
    np.savez("objects.npz", x=np.array([None, 1], object))
    np.savez("labels.npz", x=samples(), y=np.zeros((120, 2, 2)))
    message = refused(capsys, "inspect", "model.keras", "--data", data)
    assert words in message
    assert "usage" not in message
    assert len(message) < 300
    for forbidden in ("pickle", "Errno", "[Op"):
        assert forbidden not in message.replace("pickled.npz", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--x", "z"], "data.npz must hold one called z, not x, y"),
        (["--y", "z"], "data.npz holds no z, but x, y"),
    ],
)
def test_names_that_the_file_has_not(model, capsys, options, words):
    np.savez("data.npz", x=samples(), y=np.ones(120))
    arguments = ["inspect", "model.keras", "--data", "data.npz", *options]
    assert words in refused(capsys, *arguments)
