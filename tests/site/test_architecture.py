"""The seams: what imports what, what TensorFlow's name may touch, what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import keras_bn

PACKAGE = Path(keras_bn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Each layer of the house may import those below it.
ORDER = [
    {"version", "quiet"},
    {"moments"},
    {"kernels", "moving"},
    {"renorm"},
    {"step", "arguments", "frozen", "stored"},
    {"layer"},
    {"tools", "proof", "bench"},
    {"diagnosis"},
    {"commands", "testing"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def part(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source):
    """Dotted names of everything a module imports, with the line of each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(name, source):
    """The imports of a module of the part `name` that do not go downward."""
    for imported in imports(source):
        if imported.startswith("keras_bn."):
            target = imported.split(".")[1]
            if target in LEVEL and target != name and LEVEL[target] >= LEVEL[name]:
                yield imported


def names_tensorflow(source):
    return any(name.split(".")[0] == "tensorflow" for name in imports(source))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    name = part(path)
    if name == "__init__":
        return
    assert name in LEVEL, f"say in ORDER where {name} belongs"
    assert not list(upward(name, path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_tensorflow_by_name_is_in_its_own_folder_only(path):
    own = PACKAGE / "kernels" / "tensorflow"
    assert own in path.parents or not names_tensorflow(path.read_text())


def test_these_guards_can_fail():
    assert list(upward("moments", "from keras_bn.layer import BatchNormalization"))
    assert list(upward("kernels", "from keras_bn import cli"))
    assert not list(upward("layer", "from keras_bn import kernels"))
    assert names_tensorflow("import tensorflow as tf")
    assert names_tensorflow("from tensorflow.python import ops")


def in_a_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )


def test_importing_imports_nothing_optional():
    """Beyond what TensorFlow and Keras import themselves."""
    result = in_a_process(
        "import sys, tensorflow, keras; before = set(sys.modules); import keras_bn; "
        "optional = {'torch', 'matplotlib', 'sklearn', 'onnx', 'tf2onnx', 'rich'}; "
        "print(sorted(optional & set(sys.modules) - before))"
    )
    assert result.stdout.strip() == "[]", result.stderr[-2000:]


def test_another_backend_is_refused_in_words():
    pytest.importorskip("torch", reason="the other backend of this test")
    code = (
        "import os; os.environ['KERAS_BACKEND'] = 'torch'\n"
        "try:\n    import keras_bn\nexcept ImportError as error:\n    print(error)"
    )
    result = in_a_process(code)
    assert "keras_bn runs on Keras's TensorFlow backend" in result.stdout
    assert "'torch'" in result.stdout


@pytest.mark.parametrize("name", [n for n in keras_bn.__all__ if n != "__version__"])
def test_public_names_are_documented_with_an_example(name):
    doc = getattr(keras_bn, name).__doc__
    assert doc
    assert ">>>" in doc, "its example runs as a doctest"
    assert "Args:" in doc or "Returns:" in doc
