"""The seams: what imports what, where a backend is named, what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import keras_bn
from keras_bn.surgery import private

PACKAGE = Path(keras_bn.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
BACKENDS = ("tensorflow", "torch", "jax")

# Each layer of the house may import those below it.
ORDER = [
    {"version", "importing"},
    {"moments"},
    {"backends"},
    {"layer"},
    {"pages", "surgery"},
    {"passes"},
    {"tools", "verify"},
    {"loading"},
    {"diagnosis", "int8"},
    {"testing"},
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


def named(source):
    """The backends that a module imports."""
    return {name.split(".")[0] for name in imports(source)} & set(BACKENDS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    name = part(path)
    if name == "__init__":
        return
    assert name in LEVEL, f"say in ORDER where {name} belongs"
    assert not list(upward(name, path.read_text()))


def at_the_top(source):
    """The module without what its functions import."""
    tree = ast.parse(source)
    tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    return ast.unparse(tree)


# TensorFlow's converter and interpreter, and the layers of PyTorch, imported in
# functions: they are what these files are about.
ABOUT = {
    PACKAGE / "cli" / "data.py": "tensorflow",
    PACKAGE / "int8" / "tflite.py": "tensorflow",
    PACKAGE / "tools" / "pytorch.py": "torch",
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_backend_is_named_in_its_own_folder_only(path):
    own = {b for b in BACKENDS if PACKAGE / "backends" / b in path.parents}
    source = path.read_text()
    assert named(at_the_top(source)) <= own
    assert named(source) - own <= {ABOUT.get(path)}


# The one room that touches Keras's inside, and the files of what is private elsewhere.
SURGERY = PACKAGE / "surgery"
PRIVATE = {PACKAGE / "backends" / b / "private.py" for b in ("tensorflow", "torch")}
# What stands outside of them, with its reason: five at most.
OUTSIDE = {
    (PACKAGE / "tools" / "pytorch.py", "_BatchNorm"): (
        "the base class of all that PyTorch calls a batch normalization"
    ),
    (PACKAGE / "tools" / "pytorch.py", "_forward_hooks"): (
        "a module of PyTorch cannot be asked for its hooks"
    ),
    (PACKAGE / "tools" / "pytorch.py", "_forward_pre_hooks"): "the same",
}
# What Python documents: of named tuples, and of `os`.
PYTHONS = {"_asdict", "_fields", "_make", "_replace", "_exit"}
ON_SELF = ("self", "cls")
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")


def is_private(name):
    return name[:1] == "_" != name and name[:2] != "__" and name not in PYTHONS


def is_attribute_of(node, names):
    """Whether a node of the syntax tree is an attribute of a variable of these."""
    of_a_name = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return of_a_name and node.value.id in names


def defined(source):
    """The private names that a module defines: functions, attributes, variables."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif is_attribute_of(node, ON_SELF) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


OWN = {name for path in FILES for name in defined(path.read_text())}


def private_names(source):
    """The private names of foreign objects that a module uses.

    An attribute of `self` is foreign if nothing in the package defines it: a class of
    Keras's does then. That of another object is, if this module does not define it.
    """
    here = defined(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            own = OWN if is_attribute_of(node, ON_SELF) else set()
            if node.attr not in own | here:
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield name.value
    for name in imports(source):
        inside = name.startswith(("keras.src", "tensorflow.python", "tensorflow.lite"))
        own = name.startswith("keras_bn.")
        if inside or (not own and any(map(is_private, name.split(".")))):
            yield name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_names_stay_in_their_room(path):
    names = set(private_names(path.read_text()))
    if path in PRIVATE:
        return
    if SURGERY in path.parents:
        known = {p.name.rpartition(".")[2] for p in private.NAMES + private.ON_PYTORCH}
        assert names <= known, "say in surgery/private.py what it is, and who needs it"
        return
    assert names == {name for file, name in OUTSIDE if file == path}


def test_the_exceptions_are_few():
    assert len(OUTSIDE) <= 5


def test_these_guards_can_fail():
    assert list(private_names("layer._layers")) == ["_layers"]
    assert list(private_names("getattr(layer, '_layers')")) == ["_layers"]
    assert list(private_names("self._keras_had_it")) == ["_keras_had_it"]
    assert list(private_names("from keras.src import ops")) == ["keras.src.ops"]
    assert list(private_names("import torch._dynamo")) == ["torch._dynamo"]
    assert not list(private_names("def f(self):\n    self._a = other._a"))
    assert list(
        upward(
            "moments",
            "from keras_bn.layer import BatchNormalization",
        )
    )
    assert list(upward("backends", "from keras_bn import cli"))
    assert not list(upward("layer", "from keras_bn import backends"))
    assert named("import tensorflow as tf") == {"tensorflow"}
    assert named(at_the_top("import jax.numpy as jnp")) == {"jax"}
    assert not named(at_the_top("def f():\n    import tensorflow as tf"))
    assert named("from tensorflow.python import ops") == {"tensorflow"}


def in_a_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )


def test_importing_imports_nothing_optional():
    """Beyond what TensorFlow and Keras import themselves."""
    result = in_a_process(
        "import sys, tensorflow, keras; before = set(sys.modules); import keras_bn\n"
        "[getattr(keras_bn, name) for name in dir(keras_bn)]\n"
        "optional = {'torch', 'matplotlib', 'sklearn', 'onnx', 'tf2onnx', 'rich'}; "
        "print(sorted(optional & set(sys.modules) - before))"
    )
    assert result.stdout.strip() == "[]", result.stderr[-2000:]


@pytest.mark.slow
def test_a_backend_without_kernels_is_refused_in_words():
    code = (
        "import keras; keras.backend.backend = lambda: 'numpy'\n"
        "import keras_bn\ntry:\n    keras_bn.fold\n"
        "except ImportError as error:\n    print(error)"
    )
    result = in_a_process(code)
    assert "keras_bn runs on Keras's backends tensorflow, torch, jax" in result.stdout
    assert "'numpy'" in result.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_backend_says_what_to_do(backend):
    result = in_a_process(
        f"import os, sys; os.environ['KERAS_BACKEND'] = {backend!r}\n"
        f"sys.modules[{backend!r}] = None\n"
        "import keras_bn\ntry:\n    keras_bn.fold\n"
        "except ImportError as error:\n    print(error)"
    )
    assert f"`pip install {backend}`" in result.stdout, result.stderr[-2000:]
    assert "KERAS_BACKEND" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "tensorflow"])
def test_another_backend_needs_no_tensorflow(backend):
    pytest.importorskip(backend, reason="the other backend of this test")
    result = in_a_process(
        f"import os; os.environ['KERAS_BACKEND'] = {backend!r}\n"
        "import sys, keras; before = set(sys.modules); import keras_bn\n"
        "[getattr(keras_bn, name) for name in dir(keras_bn)]\n"
        "print('tensorflow' in set(sys.modules) - before)"
    )
    assert result.stdout.strip() == "False", result.stderr[-2000:]


# What functions return: public for annotations, shown in the examples of these.
RETURNED = {
    *("Comparison", "Drift", "DriftRow", "Finding", "Fix", "Fixed", "Fold", "Folds"),
    *("Int8Layer", "Int8Report", "LayerRecord", "LinearRamp", "MeasuredLayer"),
    *("ModelRecord", "Origin", "Report"),
}
NAMES = [name for name in keras_bn.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_documented_with_an_example(name):
    doc = getattr(keras_bn, name).__doc__
    assert doc
    assert {"Args:", "Returns:"} & {*doc.split()}
    if name not in RETURNED:
        assert ">>>" in doc, "its example runs as a doctest"
