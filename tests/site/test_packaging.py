"""What setup.cfg says, beside what the package and its tools do."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "ai_edge_litert": "ai-edge-litert"}


def setup():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def names(requirements):
    """The distributions of a list of requirements, without their versions."""
    lines = requirements.strip().splitlines()
    return {re.split(r"[\[=<>~! ]", line)[0] for line in lines}


def imported(tree):
    """`(package, whether at the top of the module)` of each import from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module]
        else:
            continue
        for name in found:
            package = name.partition(".")[0]
            if package not in sys.stdlib_module_names and package != "keras_bn":
                yield DISTRIBUTIONS.get(package, package), node in tree.body


def undeclared(source, required, optional):
    """What a module imports that nothing in setup.cfg installs.

    An extra may be imported where it is used, within a function; what is imported with
    the module must be installed with the package.
    """
    return {
        package
        for package, at_the_top in imported(ast.parse(source))
        if package not in (required if at_the_top else required | optional)
    }


FILES = sorted((ROOT / "keras_bn").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_imported_is_declared(path):
    config = setup()
    required = names(config["options"]["install_requires"])
    optional = set().union(*map(names, config["options.extras_require"].values()))
    # The folder of a backend is imported where that is Keras's.
    required |= optional & set(path.parent.relative_to(ROOT).parts)
    assert not undeclared(path.read_text(), required, optional)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("import h5py", {"h5py"}),
        ("from rich.table import Table", {"rich"}),
        ("def draw():\n    import rich.table", {"rich"}),
        ("import matplotlib.pyplot as plt", {"matplotlib"}),
        ("def draw():\n    import matplotlib", set()),
        ("import json\nimport keras\nfrom keras_bn import moments", set()),
    ],
)
def test_an_import_that_is_not_declared_is_found(source, missing):
    assert undeclared(source, {"keras"}, {"matplotlib"}) == missing


def test_ruff_is_the_same_everywhere():
    pinned = re.findall(r"ruff==[\d.]+", setup()["options.extras_require"]["dev"])
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert len(pinned) == 1
    assert re.findall(r"\[(ruff[^\]]*)\]", text) == pinned * 2


def test_the_oldest_versions_of_ci_are_those_of_setup():
    oldest = (ROOT / ".ci" / "oldest.txt").read_text()
    floors = dict(
        re.findall(r"^(\w+)>=([\d.]+)$", setup()["options"]["install_requires"], re.M)
    )
    assert floors.keys() == {"tensorflow", "keras", "numpy"}
    for name, version in floors.items():
        assert re.search(rf"^{name}=={re.escape(version)}(\.\*)?$", oldest, re.M), name
