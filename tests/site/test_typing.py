"""What users call is annotated in full, in types that can be read at run time."""

import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from conftest import require

import keras_bn

ROOT = Path(keras_bn.__file__).parents[1]
USER = ROOT / "tests" / "support" / "user.py"
PUBLIC = [getattr(keras_bn, name) for name in keras_bn.__all__ if name != "__version__"]


def functions(public):
    """The functions of a public object that are ours, without private methods."""
    if not inspect.isclass(public):
        return [public]
    bases = [base for base in public.__mro__ if base.__module__.startswith("keras_bn.")]
    found = []
    for name, member in (pair for base in bases for pair in vars(base).items()):
        if name.startswith("_") and name not in ("__init__", "__call__", "__str__"):
            continue
        accessors = isinstance(member, property)
        parts = (member.fget, member.fset) if accessors else [member]
        parts = [getattr(part, "__func__", part) for part in parts]
        found += [part for part in parts if inspect.isfunction(part)]
    return found


def untyped(function):
    """The parameters without a type, and "return"."""
    hints = typing.get_type_hints(function)
    signature = inspect.signature(function)
    names = [*signature.parameters, "return"]
    return [name for name in names if name not in hints and name not in ("self", "cls")]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda p: p.__name__)
def test_public_functions_are_annotated(public):
    found = functions(public)
    missing = {each.__qualname__: untyped(each) for each in found}
    assert not {name: names for name, names in missing.items() if names}


def test_methods_are_found():
    """Also class methods, both parts of a property, and what a base class has."""
    layer = functions(keras_bn.BatchNormalization)
    names = [function.__name__ for function in layer]
    assert {"__init__", "call", "from_config", "adapts", "save_assets"} <= set(names)
    assert names.count("trainable") == 2
    assert not {"_rule", "built", "add_weight"} & set(names)


def half(a: int, b, *, c: float = 0.0) -> int:
    """A function with one parameter that has no type."""


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (lambda x: x, ["x", "return"]),
        (lambda *args, **kwargs: 0, ["args", "kwargs", "return"]),
        (half, ["b"]),
        (keras_bn.fold, []),
    ],
)
def test_what_has_no_type_is_found(function, missing):
    assert untyped(function) == missing


def test_the_file_of_a_user_uses_every_public_name():
    used = set(re.findall(r"\bkeras_bn\.(\w+)", USER.read_text(encoding="utf-8")))
    assert not set(keras_bn.__all__) - used


def mypy(files, folder):
    """The errors that mypy finds, as lines."""
    require("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file="]
    # What is wrong in the user's file, whatever is installed beside it.
    command += ["--follow-imports=silent"]
    command += ["--cache-dir", str(folder / "cache"), *map(str, files)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode in (0, 1), result.stderr
    return [line for line in result.stdout.splitlines() if ": error: " in line]


def pyright(files, folder):
    """The errors that pyright finds, as lines."""
    require("basedpyright")
    config = {
        "include": list(map(str, files)),
        "typeCheckingMode": "standard",
        "extraPaths": [str(ROOT)],
    }
    project = folder / "pyrightconfig.json"
    project.write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--outputjson"]
    command += ["--pythonpath", sys.executable, "--project", str(project)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    diagnostics = json.loads(result.stdout)["generalDiagnostics"]
    return [
        f"{each['file']}:{each['range']['start']['line'] + 1}: {each['message']}"
        for each in diagnostics
        if each["severity"] == "error"
    ]


WRONG = """\
import keras  # type: ignore[import-untyped]

import keras_bn


def wrong(model: keras.Model) -> int:
    return keras_bn.freeze(model, fuse=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright], ids=lambda c: c.__name__)
def test_type_checkers_find_no_error_in_the_file_of_a_user(checker, tmp_path):
    require("torch")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    errors = checker([USER, wrong], tmp_path)
    assert [line for line in errors if "wrong.py:7" in line], "it looks at types"
    assert not [line for line in errors if "wrong.py:7" not in line]
