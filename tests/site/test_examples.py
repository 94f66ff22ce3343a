"""The examples, as a user runs them, and what their verdict rests on."""

import argparse
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.scripts import ROOT, assert_is_a_drawing, error_lines, run

import keras_bn

pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")
pytest.importorskip("sklearn", reason="the examples take scikit-learn's digits")

QUANTITIES = {"outputs", "weights", "moving statistics"}


@pytest.fixture
def example(monkeypatch):
    """Imports a module of examples/."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


def read_table(folder, reference, epochs, runs):
    """The table, after checks that it is whole and its verdict is that all agree."""
    table = json.loads((folder / "table.json").read_text())
    assert table["equivalent"] is True
    assert [(r["model"], r["dtype"]) for r in table["runs"]] == runs
    for one in table["runs"]:
        assert one["equivalent"] is True
        assert [row["epoch"] for row in one["epochs"]] == list(range(1, epochs + 1))
        for row in one["epochs"]:
            for side in (reference, "keras_bn"):
                assert row[side]["loss"] > 0
                assert row[side]["seconds"] > 0
                assert 0 < row[side]["accuracy"] <= 1
                assert 0.5 < row[side]["val_accuracy"] <= 1
            assert row["differences"].keys() == row["allowed"].keys() == QUANTITIES
        last = one["epochs"][-1]
        for quantity in QUANTITIES:
            difference = last["differences"][quantity]["value"]
            assert difference <= last["allowed"][quantity]
            if one["dtype"] == "float64":
                assert difference <= 1e-9
            else:
                # Two kernels that round alike to the last bit are the same kernel.
                assert difference > 0
    return table


@pytest.mark.slow
def test_dense_equivalence(tmp_path):
    # All five epochs are those of `make demo`.
    result = run("dense_equivalence.py", "--epochs", 2, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert error_lines(result) == []
    lines = result.stdout.splitlines()
    assert lines[-1] == "Verdict: equivalent"
    where = f"Table, curves and models are in {tmp_path}"
    assert where in lines
    assert max(len(line) for line in lines if line != where) <= 80
    title = "Dense(64), batch normalization, ReLU, Dense(10), softmax"
    runs = [(title, "float32"), (title, "float64")]
    for one in read_table(tmp_path, "Keras", 2, runs)["runs"]:
        assert one["reloaded_identical"] == {"Keras": True, "keras_bn": True}
        for side in ("Keras", "keras_bn"):
            assert (tmp_path / f"{side.lower()}_{one['dtype']}.keras").exists()
        losses = [row["keras_bn"]["loss"] for row in one["epochs"]]
        assert losses == sorted(losses, reverse=True)
    assert_is_a_drawing(tmp_path / "curves.png")


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_demo_runs_dense_equivalence():
    command = ["make", "--dry-run", "--no-print-directory", "demo"]
    result = subprocess.run(command, cwd=ROOT, encoding="utf-8", capture_output=True)
    assert "python examples/dense_equivalence.py" in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_torch_equivalence(tmp_path):
    pytest.importorskip("torch", reason="the example compares with PyTorch")
    result = run("torch_equivalence.py", "--epochs", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert error_lines(result) == []
    assert result.stdout.splitlines()[-1] == "Verdict: equivalent"
    models = ["784-64-BN-ReLU-10-softmax", "784-256-BN-ReLU-128-BN-ReLU-10"]
    runs = [(model, dtype) for model in models for dtype in ("float32", "float64")]
    read_table(tmp_path, "PyTorch", 1, runs)
    assert_is_a_drawing(tmp_path / "curves_1.png")
    assert_is_a_drawing(tmp_path / "curves_2.png")


def test_triton_comes_before_tensorflow_where_pytorch_does(tmp_path):
    stand_in = "import sys\nprint('tensorflow' in sys.modules)\n"
    (tmp_path / "triton.py").write_text(stand_in)
    # What the example imports next, and what brings TensorFlow, ends the process here.
    (tmp_path / "digits.py").write_text("raise SystemExit\n")
    folders = map(str, (tmp_path, ROOT / "examples", ROOT))
    result = subprocess.run(
        [sys.executable, "-c", "import torch_equivalence"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "False\n"


@pytest.mark.slow
def test_multi_worker(tmp_path):
    # Shares of 49 and 48 images.
    short = ["--epochs", 2, "--batch-size", 97]
    result = run("multi_worker.py", *short, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert error_lines(result) == []
    lines = result.stdout.splitlines()
    assert "Worker 0 is killed in epoch 2, after 10 of 14 steps." in lines
    assert re.search("Worker 1 ends .* s later: Collective ops is", result.stdout)
    assert "Both start again from the checkpoint after epoch 1." in lines
    assert "Both workers have the same bits: yes" in lines
    assert lines[-1] == "Verdict: equivalent"
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["equivalent"] is table["workers_identical"] is True
    assert table["seconds_until_noticed"] < 60
    (one,) = table["runs"]
    for epoch in one["epochs"]:
        assert max(d["value"] for d in epoch["differences"].values()) <= 1e-9
        assert epoch["together"]["loss"] == pytest.approx(epoch["alone"]["loss"])


@pytest.mark.slow
def test_workers_apart_are_not_one_process(tmp_path):
    short = ["--epochs", 1, "--batch-size", 96]
    result = run("multi_worker.py", *short, "--apart", "--out", tmp_path)
    assert result.returncode == 1, result.stderr
    assert "Both workers have the same bits: yes" in result.stdout
    assert result.stdout.splitlines()[-1] == "Verdict: NOT equivalent"


def short(folder):
    return ["--epochs", "1", "--batch-size", "96", "--out", str(folder)]


@pytest.mark.slow
def test_a_wrong_layer_is_not_equivalent(example, tmp_path, capsys):
    dense = example("dense_equivalence")
    layer = functools.partial(keras_bn.BatchNormalization, epsilon=2e-3)
    assert dense.main(short(tmp_path), ours=layer) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "Verdict: NOT equivalent"
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["equivalent"] is False
    assert [one["equivalent"] for one in table["runs"]] == [False, False]


@pytest.mark.slow
def test_a_wrong_layer_is_not_equivalent_to_torch(
    example, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("torch", reason="the example compares with PyTorch")

    class Wrong(keras_bn.BatchNormalization):
        def __init__(self, *, momentum=0.99, **kwargs):
            super().__init__(momentum=1 - momentum, **kwargs)

    torch_equivalence = example("torch_equivalence")
    model = "784-64-BN-ReLU-10-softmax"
    one = {model: torch_equivalence.MODELS[model]}
    monkeypatch.setattr(torch_equivalence, "MODELS", one)
    assert torch_equivalence.main(short(tmp_path), ours=Wrong) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "Verdict: NOT equivalent"


def write_mnist(path, **changes):
    """A file in the format of the real mnist.npz, of 64 and 16 images."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (64, 28, 28), "uint8"),
        "y_train": rng.integers(0, 10, 64, "uint8"),
        "x_test": rng.integers(0, 256, (16, 28, 28), "uint8"),
        "y_test": rng.integers(0, 10, 16, "uint8"),
        **changes,
    }
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


def test_mnist_from_a_file(example, tmp_path):
    write_mnist(path := tmp_path / "mnist.npz")
    given = ["--data", "mnist", "--mnist-file", str(path)]
    _, data = example("digits").parse("", "out", given)
    with np.load(path) as arrays:
        for ours, theirs in (("train", "train"), ("val", "test")):
            x, y = getattr(data, f"x_{ours}"), getattr(data, f"y_{ours}")
            np.testing.assert_array_equal(
                x, arrays[f"x_{theirs}"].reshape(-1, 784) / 255
            )
            np.testing.assert_array_equal(y, arrays[f"y_{theirs}"])


def test_digits_are_split_and_enlarged_the_same_way_each_time(example):
    data, again = (example("digits").enlarged_digits() for _ in range(2))
    for name, value in vars(data).items():
        np.testing.assert_array_equal(value, getattr(again, name))
    assert (data.x_train.shape, data.x_val.shape) == ((1440, 784), (357, 784))
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1
    image = data.x_val[0].reshape(28, 28)
    assert not image[[0, 1, -2, -1]].any()
    small = image[2:-2, 2:-2].reshape(8, 3, 8, 3)
    assert (small == small[:, :1, :, :1]).all()


def no_array(path):
    path.write_bytes(b"not an archive")


def one_bare_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def cut_off(path):
    write_mnist(path)
    path.write_bytes(path.read_bytes()[:5000])


def pickled(path):
    write_mnist(path, x_train=np.array([{}], object))


UNREADABLE = {
    "missing": lambda path: None,
    "empty": lambda path: path.touch(),
    "no array": no_array,
    "one bare array": one_bare_array,
    "cut off": cut_off,
    "pickled": pickled,
    "an array left out": functools.partial(write_mnist, y_test=None),
    "floats": functools.partial(write_mnist, x_train=np.zeros((64, 28, 28))),
    "small images": functools.partial(write_mnist, x_test=np.zeros((16, 8, 8), "B")),
    "no images": functools.partial(
        write_mnist, x_test=np.zeros((0, 28, 28), "B"), y_test=np.zeros(0, "B")
    ),
    "too few labels": functools.partial(write_mnist, y_train=np.zeros(63, "B")),
    "labels of letters": functools.partial(write_mnist, y_train=np.full(64, 11, "B")),
}


@pytest.mark.parametrize("write", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_not_mnist(example, tmp_path, capsys, write):
    write(path := tmp_path / "mnist.npz")
    arguments = ["--data", "mnist", "--mnist-file", str(path), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        example("dense_equivalence").main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert str(path) in said.err
    assert "x_train and x_test" in said.err


@pytest.mark.slow
def test_mnist_without_a_network(tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    result = run(
        "dense_equivalence.py", "--data", "mnist", KERAS_HOME=str(tmp_path), **nowhere
    )
    assert result.returncode == 2
    assert len(error_lines(result)) == 1
    assert "--mnist-file" in result.stderr
    assert "online" in result.stderr
    assert "Verdict" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["--mnist-file", "mnist.npz"], "--data mnist"),
        (["--batch-size", "1"], "less than 2"),
        (["--batch-size", "2000"], "1440 images"),
        (["--epochs", "0"], "less than 1"),
        (["--epochs", "many"], "many"),
        (["--data", "cifar"], "cifar"),
    ],
)
def test_bad_arguments(example, tmp_path, capsys, arguments, about):
    with pytest.raises(SystemExit) as stopped:
        example("dense_equivalence").main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert about in capsys.readouterr().err


class Recorder:
    """A side that trains nothing and remembers the rows it was given."""

    def __init__(self, name):
        self.name, self.rows = name, []

    def train(self, x, y, batch_size, tick):
        np.testing.assert_array_equal(x[:, 0].astype(int), y)
        self.rows.append(y.reshape(-1, batch_size))
        return 1.0, 0.5

    def outputs(self, x):
        return np.eye(10)[np.zeros(len(x), int)]

    def weights(self):
        return {"kernel": np.zeros(2)}

    moving_statistics = weights


class Unwatched:
    def __getattr__(self, name):
        return lambda *_: None


def test_both_sides_get_the_same_batches(example):
    equivalence = example("equivalence")
    rows = np.arange(23)
    x = np.repeat(rows[:, None], 784, axis=1).astype(float)
    data = example("digits").data.Data(x, rows, x[:4], rows[:4] * 0)
    arguments = argparse.Namespace(epochs=3, batch_size=5, seed=1)
    made = {"float32": [], "float64": []}

    def side(name, dtype):
        made[dtype].append(Recorder(name))
        return made[dtype][-1]

    for dtype in made:
        equivalence.side_by_side(
            "",
            dtype,
            lambda dtype=dtype: side("reference", dtype),
            lambda dtype=dtype: side("ours", dtype),
            data,
            arguments,
            Unwatched(),
        )
    reference, ours, *reordered = made["float32"]
    assert (reference.name, ours.name) == ("reference", "ours")
    assert len(reordered) == equivalence.REORDERED
    assert len(made["float64"]) == 2
    for epoch, batches in enumerate(reference.rows):
        assert batches.shape == (4, 5)
        assert len(np.unique(batches)) == batches.size
        for side in (ours, *made["float64"]):
            np.testing.assert_array_equal(side.rows[epoch], batches)
        for side in reordered:
            own = side.rows[epoch]
            assert not np.array_equal(own, batches)
            np.testing.assert_array_equal(np.sort(own), np.sort(batches))
    assert not np.array_equal(reference.rows[0], reference.rows[1])


def snapshot(equivalence, value):
    arrays = {quantity: {"a": np.array([0.0, value])} for quantity in QUANTITIES}
    return equivalence.Snapshot(1.0, 1.0, 1.0, 1.0, arrays)


def judge(equivalence, dtype, reloaded, *values):
    snapshots = [snapshot(equivalence, value) for value in values]
    return equivalence.Run("", dtype, "reference", [snapshots], reloaded).equivalent()


def test_the_criterion(example):
    equivalence = example("equivalence")
    judged = functools.partial(judge, equivalence)
    # float64: 1e-9.
    assert judged("float64", {}, 1.0, 1.0 + 0.9e-9)
    assert not judged("float64", {}, 1.0, 1.0 + 1.1e-9)
    # float32: twice the largest distance within the reference and its reorderings.
    assert judged("float32", {}, 0.0, 5.9, -1.0, 2.0)
    assert not judged("float32", {}, 0.0, 6.1, -1.0, 2.0)
    assert not judged("float32", {}, 0.0, 0.1, 0.0, 0.0)
    # NaN is never equivalent, wherever it is.
    assert not judged("float64", {}, 1.0, np.nan)
    assert not judged("float64", {}, np.nan, np.nan)
    assert not judged("float32", {}, 0.0, 0.0, 1.0, np.nan)
    # Nor is a model whose outputs change on the way to the disk and back.
    assert judged("float64", {"keras_bn": True}, 1.0, 1.0)
    assert not judged("float64", {"keras_bn": False}, 1.0, 1.0)


def test_precision_is_put_back(example):
    import keras

    def settings():
        return keras.config.floatx(), keras.config.dtype_policy().name

    before = settings()
    with example("equivalence").precision("float64"):
        assert settings() == ("float64", "float64")
    assert settings() == before
