"""Files that are broken: one class of error, one sentence, and the cause behind it."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers

import keras_bn

pytestmark = pytest.mark.filterwarnings("ignore:.*HDF5")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a model's files, by suffix."""
    folder = tmp_path_factory.mktemp("broken")
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(3, name="dense"),
            layers.BatchNormalization(),
        ]
    )
    model.compile("adam", "mse")
    model.train_on_batch(np.ones((4, 3)), np.ones((4, 3)))
    for suffix in ".keras", ".h5":
        model.save(folder / f"model{suffix}")
    return {p.suffix: p.read_bytes() for p in folder.iterdir()}


def entry(name, change):
    """Another content for an entry of an archive; None takes it out."""

    def broken(path):
        with zipfile.ZipFile(path) as archive:
            parts = {n: archive.read(n) for n in archive.namelist()}
        parts[name] = change(parts[name])
        with zipfile.ZipFile(path, "w") as archive:
            for part, content in parts.items():
                if content is not None:
                    archive.writestr(part, content)

    return broken


def config(change):
    """Another config, whatever the format."""

    def broken(path):
        def changed(text):
            return json.dumps(change(json.loads(text)))

        if path.suffix == ".keras":
            entry("config.json", changed)(path)
        else:
            with h5py.File(path, "r+") as file:
                file.attrs["model_config"] = changed(file.attrs["model_config"])

    return broken


def without(*keys):
    """A change that takes out what the keys lead to."""

    def change(whole):
        part = whole
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]
        return whole

    return config(change)


def replaced(value, *keys):
    def change(whole):
        part = whole
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        return whole

    return config(change)


def in_hdf5(change):
    def broken(path):
        with h5py.File(path, "r+") as file:
            change(file)

    return broken


def cut(share):
    def broken(path):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return broken


def flipped(path):
    """A byte in the middle of the weights is another."""
    content = bytearray(path.read_bytes())
    place = content.index(b"model.weights.h5") + 5000
    content[place] ^= 0xFF
    path.write_bytes(content)


def attribute(name, value):
    return in_hdf5(lambda file: file.attrs.__setitem__(name, value))


LAYERS = ("config", "layers")
BOTH = {
    "a list": config(lambda whole: [whole]),
    "null": config(lambda whole: None),
    "a number": config(lambda whole: 3),
    "empty": config(lambda whole: {}),
    "no class": without("class_name"),
    "no config": without("config"),
    "config of text": replaced("text", "config"),
    "no layers": without(*LAYERS),
    "layers of text": replaced("text", *LAYERS),
    "layers of numbers": replaced([1, 2], *LAYERS),
    "a layer without config": without(*LAYERS, 1, "config"),
    "a layer without class": without(*LAYERS, 1, "class_name"),
    "an unknown class": replaced("Unknown", *LAYERS, 1, "class_name"),
    "a class of a number": replaced(7, *LAYERS, 1, "class_name"),
    "units of text": replaced("many", *LAYERS, 1, "config", "units"),
    "negative units": replaced(-1, *LAYERS, 1, "config", "units"),
    "other units": replaced(5, *LAYERS, 1, "config", "units"),
    "an unknown argument": replaced(1, *LAYERS, 1, "config", "depth"),
    "an axis out of range": replaced(7, *LAYERS, 2, "config", "axis"),
    "momentum of text": replaced("high", *LAYERS, 2, "config", "momentum"),
    "a shape of text": replaced("wide", *LAYERS, 0, "config", "batch_shape"),
    "nested without end": config(
        lambda whole: {**whole, "config": json.loads("[" * 900 + "]" * 900)}
    ),
    "a quarter": cut(0.25),
    "a half": cut(0.5),
    "almost all": cut(0.99),
}
ARCHIVES = {
    "config is no JSON": entry("config.json", lambda content: b"{"),
    "config is no text": entry("config.json", lambda content: b"\xff\xfe\x00"),
    "metadata is no JSON": entry("metadata.json", lambda content: b"Keras 3"),
    "no weights": entry("model.weights.h5", lambda content: None),
    "weights of text": entry("model.weights.h5", lambda content: b"weights"),
    "half of the weights": entry("model.weights.h5", lambda c: c[: len(c) // 2]),
    "no weights in it": entry("model.weights.h5", lambda content: b""),
    "a flipped byte": flipped,
}
HDF5 = {
    "config is no JSON": attribute("model_config", "{"),
    "config is a number": attribute("model_config", 3),
    "config is no text": attribute("model_config", np.bytes_(b"\xff\xfe")),
    "no config": in_hdf5(lambda file: file.attrs.__delitem__("model_config")),
    "no weights": in_hdf5(lambda file: file.__delitem__("model_weights")),
    "no names": in_hdf5(lambda file: file["model_weights"].attrs.clear()),
    "no layer": in_hdf5(lambda file: file["model_weights"].__delitem__("dense")),
    "compilation is no JSON": attribute("training_config", "{"),
    "compilation is a list": attribute("training_config", "[]"),
    "no optimizer's names": in_hdf5(
        lambda file: file["optimizer_weights"].attrs.clear()
    ),
}
CASES = [
    *[(".keras", name, broken) for name, broken in {**BOTH, **ARCHIVES}.items()],
    *[(".h5", name, broken) for name, broken in {**BOTH, **HDF5}.items()],
]


@pytest.mark.parametrize(
    ("suffix", "broken"),
    [(suffix, broken) for suffix, _, broken in CASES],
    ids=[f"{suffix} {name}" for suffix, name, _ in CASES],
)
def test_a_broken_file_is_a_value_error(saved, tmp_path, suffix, broken):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(saved[suffix])
    broken(path)
    with pytest.raises(ValueError, match=r".") as caught:
        keras_bn.load_model(path)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert str(path) in message
    assert "\n" not in message
    assert "model.keras" not in message.replace(str(path), "")
    assert "/tmp" not in message.replace(str(path), "")
    own = ("is not a Keras model", "is not that of a model", "holds weights")
    caused = caught.value.__cause__ is not None
    assert caused != any(text in message for text in own)


def test_an_entry_that_is_encrypted(saved, tmp_path):
    path = tmp_path / "model.keras"
    content = bytearray(saved[".keras"])
    start = content.rindex(b"config.json") - 46
    content[start + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged, or no Keras model .*encrypted"):
        keras_bn.load_model(path)


def test_what_is_not_the_file_s_fault_keeps_its_class(saved, tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    with pytest.raises(FileNotFoundError):
        keras_bn.load_model(path)
    path.write_bytes(saved[".keras"])

    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(keras.saving, "load_model", full)
    with pytest.raises(MemoryError):
        keras_bn.load_model(path)
