"""Every artifact in saved_models/ opens with this version and gives what it gave."""

import json
import runpy
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from support import backend
from support.steps import array, relative_error

import keras_bn

FOLDER = Path(__file__).parents[2] / "saved_models"
VERSIONS = sorted(path for path in FOLDER.glob("v*") if path.is_dir())


def from_keras_file(folder):
    return keras.saving.load_model(folder / "model.keras")


def from_weights(folder):
    model = keras.models.clone_model(from_keras_file(folder))
    model.load_weights(folder / "model.weights.h5")
    return model


def from_saved_model(folder):
    tf = backend.tensorflow("SavedModels are its own")
    loaded = tf.saved_model.load(folder / "exported")
    return lambda inputs: loaded.serve(inputs)


FILES = ("model.keras", "model.weights.h5", "exported")
LOADERS = {"model.keras": from_keras_file, "model.weights.h5": from_weights}
if backend.NAME == "tensorflow":
    LOADERS["exported"] = from_saved_model


def release(version):
    return tuple(int(part) for part in version.split(".")[:2])


def check(folder):
    """Open every artifact of a version, miss none, and compare the outputs.

    To 32 units of float32 and not to the bit: another CPU, with wider or narrower
    vectors or without fused multiply and add, sums a convolution in another order.
    """
    names = {path.name for path in folder.iterdir()}
    assert names == {*FILES, "io.npz", "info.json"}
    info = json.loads((folder / "info.json").read_text())
    assert folder.name == f"v{info['keras_bn']}"
    if release(keras.__version__) < release(info["keras"]):
        pytest.skip(f"Keras {keras.__version__} opens no file of {info['keras']}")
    arrays = np.load(folder / "io.npz")
    for name, load in LOADERS.items():
        outputs = array(load(folder)(arrays["inputs"]))
        assert outputs.shape == arrays["outputs"].shape
        error = relative_error(outputs, arrays["outputs"])
        assert error < 32 * np.finfo("float32").eps, name


def test_this_version_has_written_its_artifacts():
    assert f"v{keras_bn.__version__}" in [path.name for path in VERSIONS]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_every_artifact_opens_and_gives_the_same(folder):
    check(folder)


def test_the_artifacts_stay_small():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 300_000 * len(VERSIONS)


@pytest.mark.parametrize("missing", [*FILES, "io.npz", "info.json"])
def test_a_missing_artifact_is_noticed(missing, tmp_path):
    ignore = shutil.ignore_patterns(missing)
    copy = shutil.copytree(VERSIONS[-1], tmp_path / VERSIONS[-1].name, ignore=ignore)
    with pytest.raises(AssertionError):
        check(copy)


def test_other_outputs_are_noticed(tmp_path):
    copy = shutil.copytree(VERSIONS[-1], tmp_path / VERSIONS[-1].name)
    arrays = dict(np.load(copy / "io.npz"))
    np.savez(copy / "io.npz", **arrays | {"outputs": arrays["outputs"] * 1.0001})
    with pytest.raises(AssertionError, match=r"model\.keras"):
        check(copy)


@backend.only("tensorflow", "it writes a SavedModel")
def test_the_writer_writes_the_same_numbers_and_overwrites_only_by_force(tmp_path):
    main = runpy.run_path(FOLDER / "write.py")["main"]
    into = ["--into", str(tmp_path)]
    main(into)
    folder = tmp_path / f"v{keras_bn.__version__}"
    check(folder)
    before = dict(np.load(folder / "io.npz"))
    with pytest.raises(SystemExit, match="--force"):
        main(into)
    main([*into, "--force"])
    after = np.load(folder / "io.npz")
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
