"""Commands without TensorFlow's start-up notices; programs keep their logging."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from support.backend import only

import keras_bn
from keras_bn.backends import modes
from keras_bn.pages.streams import stderr_held_back

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
    program.write_text(f"import os\nimport keras_bn\nkeras_bn.fold\n{level}\n")
    done = process(program)
    assert done.stdout == "None\n"
    assert "TensorFlow" in done.stderr


@pytest.mark.slow
@NOTICES
def test_who_asks_for_the_notices_gets_them(model):
    done = process("-m", "keras_bn", "inspect", model, TF_CPP_MIN_LOG_LEVEL="0")
    assert done.returncode == 0
    assert "TensorFlow" in done.stderr


@pytest.mark.slow
@NOTICES
def test_who_asks_for_silence_gets_it(model):
    done = process("-m", "keras_bn", "inspect", model, TF_CPP_MIN_LOG_LEVEL="3")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def failing(tmp_path):
    """Runs `inspect` where Keras is the code that is given."""

    def run(code, *arguments, **variables):
        (tmp_path / "keras.py").write_text(code)
        (tmp_path / "model.keras").touch()
        path = f"{tmp_path}{os.pathsep}{ROOT}"
        arguments = arguments or ("-m", "keras_bn", "inspect", tmp_path / "model.keras")
        return process(*arguments, PYTHONPATH=path, **variables)

    return run


def test_what_libraries_say_before_they_fail_is_shown(failing):
    done = failing(
        "import os\nos.write(2, b'no such device')\nraise ImportError('broken')\n"
    )
    assert done.returncode == 1
    assert "no such device" in done.stderr
    assert "ImportError: broken" in done.stderr


MISSING = "raise ModuleNotFoundError('No such module', name='tensorflow.python')"


@pytest.mark.parametrize("logging", [{}, {"TF_CPP_MIN_LOG_LEVEL": "0"}], ids=str)
def test_a_backend_that_is_missing_is_named_in_a_sentence(failing, logging):
    """As where only PyTorch is installed and KERAS_BACKEND is not set."""
    done = failing(MISSING, **logging)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "keras-bn inspect: error: Keras's backend is 'tensorflow', which is"
    )
    assert "or set KERAS_BACKEND to another of tensorflow, torch, jax" in line
    assert failing(MISSING, "-m", "keras_bn", "--help").returncode == 0
    program = failing(MISSING, "-c", "from keras_bn import BatchNormalization")
    assert "`pip install tensorflow`" in program.stderr


SLOW_TO_IMPORT = """
import os, pathlib, signal, time
os.write(2, b"a notice")
try:
    {interrupt}
except BaseException:  # as some libraries do
    pass
time.sleep({seconds})
"""
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize("logging", [{}, {"TF_CPP_MIN_LOG_LEVEL": "0"}], ids=str)
def test_interrupted_while_keras_is_imported(failing, logging):
    done = failing(SLOW_TO_IMPORT.format(interrupt=INTERRUPT, seconds=20), **logging)
    assert done.returncode == 130
    assert done.stderr.removeprefix("a notice" if logging else "") == (
        "keras-bn inspect: interrupted\n"
    )


NEITHER = """
import sys
sys.modules["keras"] = sys.modules["numpy"] = None
from keras_bn.cli.main import main
try:
    raise SystemExit(main())
finally:
    import time
    print(f"took {time.process_time():.2f} s of CPU", file=sys.stderr)
    assert time.process_time() < 0.3
"""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, ""),
        (["inspect", "--help"], 0, ""),
        (["--version"], 0, ""),
        ([], 2, "usage: "),
        (["prove"], 2, "usage: "),
        (["fold", "--quick"], 2, "usage: "),
        (["fold", "no.keras", "out.keras"], 2, "error: there is no file no.keras\n"),
        (["fold", "in.keras", "in.keras"], 2, "in.keras exists; --force overwrites"),
        (["fold", "in.keras", "out.txt"], 2, "out.txt must end in .keras or .h5\n"),
        (["fold", "in.keras", "no/out.keras"], 2, "there is no folder "),
        (["fold", ".", "out.keras"], 2, "error: . is a folder, not a file\n"),
        (
            ["inspect", "in.keras", "--data", "no.npz"],
            2,
            "no file no.npz; --data takes",
        ),
        (["inspect", "in.keras", "--plot", "a.png"], 2, "--plot needs --data\n"),
        (["inspect", "in.keras", "--ignore", "BN"], 2, "--ignore takes rules"),
        (["verify", "--json", "in.keras"], 2, "in.keras exists; --force overwrites"),
        (["check", "a.keras", "b.h5"], 2, ""),
        (["check", "a.keras", "--format", "sarif"], 2, ""),
    ],
    ids=str,
)
def test_answers_that_need_no_backend_are_cheap(tmp_path, arguments, status, said):
    (tmp_path / "in.keras").touch()
    done = subprocess.run(
        [sys.executable, "-c", NEITHER, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    if said and not said.startswith("usage"):
        assert "usage" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "in.keras"]


def test_as_a_module_too():
    done = process("-X", "importtime", "-m", "keras_bn", "--help")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "keras_bn.cli.main" in imported
    assert not imported & {"keras", "numpy", "rich", "tensorflow"}


def test_stderr_is_itself_again(capfd, monkeypatch):
    with open(2, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with stderr_held_back():
            os.write(2, b"a notice")
            print("another", file=sys.stderr)
        os.write(2, b"after it")
    assert capfd.readouterr().err == "after it"


def test_a_closed_stderr(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with stderr_held_back():
        os.write(2, b"as it is")
    assert capfd.readouterr().err == "as it is"
