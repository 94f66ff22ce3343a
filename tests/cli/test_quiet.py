"""Commands without TensorFlow's start-up notices; programs keep their logging."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from support.backend import only

import keras_bn
from keras_bn import quiet
from keras_bn.backends import modes

ROOT = Path(keras_bn.__file__).parents[1]
NOTICES = only("tensorflow", "its notices")
SCRIPT = "from keras_bn.cli.main import main\n\nraise SystemExit(main())\n"


def process(*command, **variables):
    """Run Python as from a fresh shell."""
    names = ("PATH", "HOME", "KERAS_BACKEND")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**kept, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "model.keras"
    layers = [keras.Input((4,)), keras.layers.BatchNormalization(name="bn")]
    keras.Sequential(layers).save(file)
    return file


def test_nothing_on_stderr_as_a_script(model, tmp_path):
    """Also of what Keras logs when it writes a file of the older format."""
    script = tmp_path / "keras-bn"  # as pip installs it
    script.write_text(SCRIPT)
    done = process(script, "convert", model, tmp_path / "out.h5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 converted" in done.stdout


@pytest.mark.slow
def test_nothing_on_stderr_as_a_module_that_compiles_where_it_can():
    mode = modes.MODES[-1]
    options = ["--shape", "8,4", "--mode", mode, "--inference", "--seconds", "0"]
    done = process("-m", "keras_bn", "bench", *options)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@NOTICES
def test_programs_keep_their_logging(tmp_path):
    program = tmp_path / "program.py"
    level = "print(os.environ.get('TF_CPP_MIN_LOG_LEVEL'))"
    program.write_text(f"import os\nimport keras_bn\n{level}\n")
    done = process(program)
    assert done.stdout == "None\n"
    assert "TensorFlow" in done.stderr


@pytest.mark.slow
@NOTICES
def test_who_asks_for_the_notices_gets_them(model):
    done = process("-m", "keras_bn", "inspect", model, TF_CPP_MIN_LOG_LEVEL="0")
    assert done.returncode == 0
    assert "TensorFlow" in done.stderr


def test_what_libraries_say_before_they_fail_is_shown(tmp_path):
    failing = "import os\nos.write(2, b'no such device')\nraise ImportError('broken')\n"
    (tmp_path / "keras.py").write_text(failing)
    done = process("-m", "keras_bn", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    assert "no such device" in done.stderr
    assert "ImportError: broken" in done.stderr


@pytest.mark.parametrize("logging", [{}, {"TF_CPP_MIN_LOG_LEVEL": "0"}], ids=str)
def test_a_backend_that_is_missing_is_named_in_a_sentence(tmp_path, logging):
    """As where only PyTorch is installed and KERAS_BACKEND is not set."""
    failing = "raise ModuleNotFoundError('No such module', name='tensorflow.python')"
    (tmp_path / "keras.py").write_text(failing)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = process("-m", "keras_bn", "--help", PYTHONPATH=path, **logging)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("keras-bn: error: Keras's backend is 'tensorflow', which is")
    assert "or set KERAS_BACKEND to another of tensorflow, torch, jax" in line
    program = process("-c", "import keras_bn", PYTHONPATH=path)
    assert "Traceback" in program.stderr


def test_stderr_is_itself_again(capfd, monkeypatch):
    with open(2, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with quiet.stderr_held_back():
            os.write(2, b"a notice")
            print("another", file=sys.stderr)
        os.write(2, b"after it")
    assert capfd.readouterr().err == "after it"


def test_a_closed_stderr(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with quiet.stderr_held_back():
        os.write(2, b"as it is")
    assert capfd.readouterr().err == "as it is"


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/usr/bin/keras-bn", "inspect"], ["python", "/usr/bin/keras-bn"], True),
        (["C:\\Scripts\\keras-bn.exe"], ["keras-bn.exe"], os.name == "nt"),
        (["keras-bn.exe"], ["keras-bn.exe"], True),
        (["-m", "verify"], ["python", "-m", "keras_bn", "verify"], True),
        (["-m"], ["python", "-X", "dev", "-m", "keras_bn"], True),
        (["-m"], ["python", "-m", "my.training"], False),
        (
            ["-m"],
            [
                "python",
                "-m",
                "pytest",
                "--pyargs",
                "keras_bn.layer.batch_normalization",
            ],
            False,
        ),
        (["train.py", "keras_bn"], ["python", "train.py", "keras_bn"], False),
        (["-c"], ["python", "-c", "import keras_bn"], False),
        ([""], ["python"], False),
        ([], ["embedded"], False),
    ],
)
def test_what_is_the_command_line(monkeypatch, argv, original, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert quiet.is_command_line() is expected
