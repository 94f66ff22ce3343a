"""`.keras` archives that others have packed, and archives that are bombs."""

import itertools
import tracemalloc
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

import keras_bn

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@keras.saving.register_keras_serializable("test_packed")
class Vocabulary(layers.Layer):
    """A layer with an asset, as lookups and tokenizers have."""

    words = "none"

    def call(self, x):
        return x

    def save_assets(self, folder):
        with open(f"{folder}/words.txt", "w", encoding="utf-8") as file:
            file.write(self.words)

    def load_assets(self, folder):
        with open(f"{folder}/words.txt", encoding="utf-8") as file:
            self.words = file.read()


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """The entries of a model's archive, and the model's statistics."""
    path = tmp_path_factory.mktemp("packed") / "model.keras"
    model = keras.Sequential(
        [keras.Input((3,)), Vocabulary(), layers.BatchNormalization(name="bn")]
    )
    model.layers[0].words = "one two"
    model.layers[1].moving_mean.assign([1.0, 2.0, 3.0])
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path, entries, compression=STORED, mode="w"):
    with zipfile.ZipFile(path, mode, compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def check(path):
    before = path.read_bytes()
    model = keras_bn.load_model(path)
    assert path.read_bytes() == before
    np.testing.assert_array_equal(model.get_layer("bn").moving_mean, [1.0, 2.0, 3.0])
    assert type(model.get_layer("bn")) is keras_bn.BatchNormalization
    assert model.layers[0].words == "one two"


@pytest.mark.parametrize("compression", [STORED, DEFLATED, zipfile.ZIP_BZIP2])
def test_every_order_of_the_entries(entries, tmp_path, compression):
    for i, order in enumerate(itertools.permutations(entries)):
        packed = {name: entries[name] for name in order}
        check(pack(tmp_path / f"{i}.keras", packed, compression))
    assert i == 23


@pytest.mark.parametrize("compression", [STORED, DEFLATED])
def test_entries_that_are_not_keras_s(entries, tmp_path, compression):
    foreign = {
        "README.md": b"packed by hand",
        "assets/": b"",
        "__MACOSX/._config.json": b"\0" * 100,
        ".DS_Store": b"\0" * 100,
        "assets/other/": b"",
    }
    check(pack(tmp_path / "a.keras", {**foreign, **entries}, compression))
    check(pack(tmp_path / "b.keras", {**entries, **foreign}, compression))


def test_an_archive_behind_other_bytes(entries, tmp_path):
    """As a self-extracting archive, or one that was cut out of a download."""
    path = pack(tmp_path / "a.keras", entries)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    check(path)


def test_the_last_entry_of_a_name_counts_as_with_keras(entries, tmp_path):
    path = pack(tmp_path / "a.keras", {**entries, "config.json": b"{}"})
    with pytest.warns(UserWarning, match="Duplicate name"):
        pack(path, {"config.json": entries["config.json"]}, mode="a")
    check(path)


def test_an_archive_without_metadata(entries, tmp_path):
    packed = {name: entries[name] for name in entries if name != "metadata.json"}
    check(pack(tmp_path / "a.keras", {**packed, "README.md": b""}))


def claim(path, name, size):
    """Have an archive say that an entry has another size than it has."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    place = content.rindex(name.encode()) - 46  # in the directory at the end
    assert content[place : place + 4] == b"PK\x01\x02"
    content[place + 24 : place + 28] = size.to_bytes(4, "little")
    path.write_bytes(bytes(content))
    return info.compress_size


@pytest.mark.parametrize(
    "name", ["assets/x.txt", "README.md", "assets/layers/vocabulary/words.txt"]
)
def test_an_entry_far_larger_than_it_is_stored_is_refused(entries, tmp_path, name):
    path = pack(tmp_path / "a.keras", {**entries, name: b"\0" * 10**6}, DEFLATED)
    claim(path, name, 2**31)
    with pytest.raises(ValueError, match="2,147,483,648 bytes, of which 985"):
        keras_bn.load_model(path)


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5", "metadata.json"])
def test_gigabytes_are_refused_before_they_are_read(entries, tmp_path, name):
    """5 GiB of zeros would take 5 MB here, and minutes to write: so a claim of them."""
    path = tmp_path / "a.keras"
    pack(path, {n: entries[n] for n in entries if n != name})
    with zipfile.ZipFile(path, "a", DEFLATED) as archive:
        with archive.open(name, "w", force_zip64=True) as entry:
            entry.write(b"\0" * 10**6)
        archive.getinfo(name).file_size = 5 * 2**30
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{name} would have 5,368,709,120 bytes"):
            keras_bn.load_model(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_much_of_the_same_is_no_bomb(tmp_path):
    """Weights of a network that was not trained: 300 MB of zeros, stored in less."""
    path = tmp_path / "a.keras"
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.BatchNormalization(name="bn"),
            layers.Dense(2**21, kernel_initializer="zeros", name="wide"),
        ]
    )
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    pack(path, packed, DEFLATED)
    assert path.stat().st_size < 2**20
    loaded = keras_bn.load_model(path)
    assert type(loaded.get_layer("bn")) is keras_bn.BatchNormalization


def test_nothing_that_keras_does_not_read_is_read(entries, tmp_path):
    """So damage there does no harm."""
    content = b"of no use to Keras"
    path = pack(tmp_path / "a.keras", {**entries, "video.mp4": content})
    path.write_bytes(path.read_bytes().replace(content, content[::-1]))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "video.mp4"
    check(path)
