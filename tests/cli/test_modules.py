"""`--import MODULE`: files with classes and functions of the user's."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from support.backend import array
from support.command_line import refused, run

from keras_bn.cli.modules import imported

SOURCE = """
import keras
from keras import layers


class Residual(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.BatchNormalization(name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return x + self.inner(x)


@keras.saving.register_keras_serializable(package="my")
class Scale(layers.Layer):
    def call(self, x):
        return 2 * x


def wave(x):
    return keras.ops.sin(x)


def distance(y, z):
    return keras.ops.mean(keras.ops.abs(y - z), -1)
"""


@pytest.fixture
def forget():
    """Forgets what the test imports and registers."""
    objects = keras.saving.get_custom_objects()
    registered, modules = dict(objects), set(sys.modules)

    def reset():
        objects.clear()
        objects.update(registered)
        for name in set(sys.modules) - modules:
            if name.split(".")[0].startswith("my_"):
                del sys.modules[name]

    yield reset
    reset()


@pytest.fixture
def folder(tmp_path, monkeypatch, forget):
    """The current folder: it holds the module `my_layers`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_layers.py").write_text(SOURCE)
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(100, 8)))
    return tmp_path


@pytest.fixture
def save(folder, forget):
    """`save(file, *names)`: a model with these of the module, between many layers."""

    def write(file, *names):
        with imported(["my_layers"]):
            module = sys.modules["my_layers"]
            x = image = keras.Input((8,))
            for _ in range(5):
                x = layers.BatchNormalization()(layers.Dense(8)(x))
            for name in names:
                made = getattr(module, name)
                layer = made() if isinstance(made, type) else layers.Activation(made)
                x = layer(x)
            keras.Model(image, layers.Dense(2)(x)).save(file)
        forget()

    return write


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Residual", "Could not locate class 'Residual'; --import"),
        ("Scale", "Could not locate class 'Scale'; --import"),
        ("wave", "Could not locate function 'wave'; --import"),
    ],
)
def test_the_cause_is_said_and_what_helps(save, folder, capsys, name, said):
    save("in.keras", name)
    message = refused(capsys, "inspect", "in.keras")
    assert f"in.keras can't be loaded: {said}" in message
    assert message.endswith("--import MODULE imports the module that defines it")
    assert "config" not in message
    assert run("inspect", "in.keras", "--import", "my_layers") == 0


def test_the_cause_in_hdf5(save, folder, capsys):
    save("in.h5", "Scale")
    message = refused(capsys, "inspect", "in.h5")
    assert "Unknown layer: 'my>Scale'" in message
    assert message.endswith("--import MODULE imports the module that defines it")
    assert run("inspect", "in.h5", "--import", "my_layers") == 0


@pytest.mark.parametrize("command", ["convert", "fold", "recalibrate"])
def test_every_command_that_opens_a_model_imports(save, folder, command):
    save("in.keras", "Residual", "Scale", "wave")
    options = ["--data", "data.npz"] if command == "recalibrate" else []
    options += ["--import", "my_layers"]
    assert run(command, "in.keras", "out.keras", *options) == 0
    assert run("inspect", "out.keras", "--import", "my_layers") == 0


def test_a_loss_of_a_compiled_model(folder, forget):
    with imported(["my_layers"]):
        model = keras.Sequential([keras.Input((8,)), layers.BatchNormalization()])
        model.compile("sgd", sys.modules["my_layers"].distance)
        model.save("in.keras")
    forget()
    data = ["--data", "data.npz"]
    assert run("inspect", "in.keras", "--import", "my_layers", *data) == 1


def test_the_state_is_that_of_the_layer(save, folder):
    """Also where Keras names a layer anew whenever it makes a model."""
    save("in.keras", "Residual")
    options = ["--import", "my_layers", "--data", "data.npz", "--json", "a.json"]
    assert run("inspect", "in.keras", *options) == 1
    results = json.loads(Path("a.json").read_text())
    assert len(results["layers"]) == 6
    for layer in results["layers"]:
        assert layer["state"].startswith("never updated")


def test_modules_in_packages_and_several_of_them(folder):
    package = folder / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("from my_package.layers import Shift\n")
    (package / "layers.py").write_text(
        "import keras\n\n\nclass Shift(keras.layers.Layer):\n"
        "    def call(self, x):\n        return x + 1\n"
    )
    with imported(["my_package", "my_layers"]):
        shift, scale = sys.modules["my_package"].Shift, sys.modules["my_layers"].Scale
        x = [keras.Input((8,)), shift(), layers.BatchNormalization(), scale()]
        keras.Sequential(x).save("in.keras")
    for module in ("my_package", "my_package.layers"):
        modules = ["--import", module, "--import", "my_layers"]
        assert run("inspect", "in.keras", *modules) == 0


def test_nothing_of_it_stays(save, folder):
    save("in.keras", "Residual")
    path = list(sys.path)
    assert run("inspect", "in.keras", "--import", "my_layers") == 0
    assert sys.path == path
    assert keras.saving.get_registered_object("Residual") is None


def test_what_a_module_has_from_elsewhere_is_not_taken(folder):
    (folder / "my_names.py").write_text("from keras.layers import Dense as Residual\n")
    with imported(["my_names"]):
        assert keras.saving.get_registered_object("Residual") is None


WRONG = {
    "my_gone": "--import my_gone: no module 'my_gone' is installed or in the current",
    "my_layers.more": "--import my_layers.more: no module 'my_layers.more' is",
    "my_layers.py": "the name of a module, such as my_layers, not my_layers.py",
    "my_broken": "--import my_broken fails: SyntaxError: ",
    "my_needs": "--import my_needs fails: No module named 'my_need'",
    "my_fault": "--import my_fault fails: ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("name", WRONG)
def test_modules_that_cannot_be_imported(folder, capsys, name):
    (folder / "my_broken.py").write_text("class :\n")
    (folder / "my_needs.py").write_text("import my_need\n")
    (folder / "my_fault.py").write_text("1 / 0\n")
    (folder / "in.keras").touch()
    path = list(sys.path)
    assert WRONG[name] in refused(capsys, "inspect", "in.keras", "--import", name)
    assert sys.path == path


SUBCLASSED = """
import keras


@keras.saving.register_keras_serializable(package="my")
class Net(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.dense = keras.layers.Dense(3, name="dense")
        self.norm = keras.layers.BatchNormalization(name="norm")

    def call(self, inputs):
        return self.norm(self.dense(inputs))
"""


def test_a_subclassed_model_folds_as_inspect_says(folder, forget, capsys):
    (folder / "my_net.py").write_text(SUBCLASSED)
    with imported(["my_net"]):
        model = sys.modules["my_net"].Net()
        x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
        expected = model(x)
        model.save("net.keras")
    with_module = "--import", "my_net"
    forget()
    assert run("inspect", "net.keras", *with_module, "--json", "a.json") == 0
    (layer,) = json.loads(Path("a.json").read_text())["layers"]
    forget()
    assert run("fold", "net.keras", "f.keras", *with_module, "--json", "b.json") == 0
    folded = json.loads(Path("b.json").read_text())["folded"]
    assert folded == {layer["layer"]: layer["fold_into"]} == {"norm": "dense"}
    loaded = keras.saving.load_model("f.keras")
    assert not any("Norm" in type(part).__name__ for part in loaded.layers)
    np.testing.assert_allclose(array(loaded(x)), array(expected), rtol=1e-4, atol=1e-5)
