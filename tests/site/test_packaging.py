"""What setup.cfg says, beside what the package and its tools do."""

import ast
import configparser
import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import require

from keras_bn.version import __version__

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "ai_edge_litert": "ai-edge-litert"}
# `tomllib` came with Python 3.11; before, `tomli` stands in for it.
STANDARD = sys.stdlib_module_names | {"tomllib"}


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
            if package not in STANDARD and package != "keras_bn":
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
    extras = setup()["options.extras_require"]
    pinned = re.findall(r"ruff==[\d.]+", extras["dev"])
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert len(pinned) == 1
    assert re.findall(r"\[(ruff[^\]]*)\]", text) == pinned * 2
    assert re.findall(r"ruff==[\d.]+", extras["docs"]) == pinned


def test_the_oldest_versions_of_ci_are_those_of_setup():
    oldest = (ROOT / ".ci" / "oldest.txt").read_text()
    floors = dict(
        re.findall(r"^(\w+)>=([\d.]+)$", setup()["options"]["install_requires"], re.M)
    )
    assert floors.keys() == {"tensorflow", "keras", "numpy"}
    for name, version in floors.items():
        assert re.search(rf"^{name}=={re.escape(version)}(\.\*)?$", oldest, re.M), name


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project without what git ignores, as a publisher builds it."""
    require("setuptools")
    folder = tmp_path_factory.mktemp("project")
    unwanted = ".git", ".venv", "build", "dist", "*.egg-info", ".*_cache"
    ignore = shutil.ignore_patterns(*unwanted, "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
    shutil.rmtree(folder / "site", ignore_errors=True)  # the built one
    return folder


def built(project, kind):
    """Build a wheel or an sdist with setuptools, without a fresh environment."""
    code = (
        "import sys; from setuptools import build_meta; "
        f"print(build_meta.build_{kind}(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(project / "dist")]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=project, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return project / "dist" / result.stdout.splitlines()[-1]


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name)), archive.namelist()


# Of links and pictures in Markdown: their targets.
TARGET = re.compile(r"\]\(([^)]*)\)")
ADDRESS = "https://forge.example/someone/keras_bn"


def test_a_wheel_with_an_address_has_no_relative_link(project):
    setup = project / "setup.cfg"
    text = setup.read_text()
    setup.write_text(
        text.replace("project_urls =\n", f"project_urls =\n    Source = {ADDRESS}\n")
    )
    metadata, names = metadata_of(built(project, "wheel"))
    setup.write_text(text)
    assert metadata["Project-URL"] == f"Source, {ADDRESS}"
    description = metadata.get_payload()
    targets = TARGET.findall(description)
    assert len(targets) == len(TARGET.findall((ROOT / "README.md").read_text()))
    for target in targets:
        assert re.match("https?://", target), target
        kind, _, path = target.removeprefix(f"{ADDRESS}/").partition("/main/")
        if kind in ("blob", "raw"):
            assert (ROOT / path.partition("#")[0]).exists(), target
            assert (kind == "raw") == path.endswith(".png")
    assert metadata["Description-Content-Type"] == "text/markdown"
    for version in "3.10", "3.11", "3.12", "3.13":
        assert f"Python :: {version}" in str(metadata)
    for file in "py.typed", "pages/templates/page.html", "pages/templates/style.css":
        assert f"keras_bn/{file}" in names


def test_a_wheel_without_an_address_has_no_dead_link(project):
    metadata, _ = metadata_of(built(project, "wheel"))
    targets = TARGET.findall(metadata.get_payload())
    assert all(re.match("https?://", target) for target in targets)


def test_the_sdist_holds_the_project(project):
    with tarfile.open(built(project, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for file in (
        *("CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt"),
        *("docs/tutorial.md", "docs/pictures/recalibrated.png", "mkdocs.yml"),
        *("examples/digits.py", "tests/oracle.py", "tests/site/test_docs.py"),
        *("saved_models/README.md", "benchmarks/NOTES.md", ".ci/run", "setup.py"),
        "keras_bn/pages/templates/page.html",
    ):
        assert file in names, file
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in text
