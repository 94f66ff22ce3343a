"""What the documentation states, something executes."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import require
from support.marks import mostly_slow

from keras_bn.cli.main import main
from keras_bn.diagnosis.rules import RULES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def run_blocks(page):
    """Run the blocks of Python of a page, one after another."""
    namespace = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


# The tutorial runs as a notebook, in test_notebook.py; the README, with its commands,
# in a test of its own.
OWN = "tutorial.md", "README.md"
EXECUTED = [p for p in PAGES if blocks(p) and p.name not in OWN]
SLOW = [p for p in EXECUTED if p.name in ("int8.md", "tools.md")]


@pytest.mark.parametrize(
    "page",
    mostly_slow(EXECUTED, [p for p in EXECUTED if p not in SLOW]),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in ("matplotlib", "sklearn", "torch"):
        if any(package in block for block in blocks(page)):
            require(package)
    run_blocks(page)


# The commands of the README on the files that its blocks write.
COMMAND = re.compile(r"^    keras-bn ((?!verify).*?)(?:  # (.*))?$", re.M)


def test_the_readme_runs_from_top_to_bottom_in_one_folder(tmp_path, monkeypatch):
    for package in ("matplotlib", "sklearn"):
        require(package)
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / "README.md")
    commands = COMMAND.findall((ROOT / "README.md").read_text())
    assert len(commands) == 4
    for words, comment in commands:
        fails = "exit status 1" in comment or "inspect" in words
        assert main(shlex.split(words)) == int(fails), words
    assert (tmp_path / "folded.keras").exists()


def test_the_layer_is_in_use_within_ten_lines_of_the_readme():
    head = (ROOT / "README.md").read_text().splitlines()[:10]
    assert any("keras_bn.BatchNormalization(" in line for line in head)


def test_the_first_lines_of_the_readme_are_run_further_down():
    text = (ROOT / "README.md").read_text()
    (first,) = re.findall(r"^```py\n(.*?)^```", text, re.M | re.S)
    run = {
        line.partition("  #")[0]
        for line in "".join(blocks(ROOT / "README.md")).splitlines()
    }
    for line in first.splitlines():
        statement = line.partition("  #")[0].removeprefix("print(").removesuffix(")")
        assert any(statement in one for one in run), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_architecture_page_lists_the_files_as_they_are():
    path = ROOT / "docs" / "_site" / "rooms.py"
    spec = importlib.util.spec_from_file_location("rooms", path)
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    page = rooms.PAGE.read_text(encoding="utf-8")
    assert page == rooms.written(page), "run: python docs/_site/rooms.py"


# What a page names though it is not in a checkout: files of other projects, files that
# commands write, and patterns.
PATH = re.compile(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|txt|cfg|toml|yml|json|png))`")
MARKDOWN = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "site", "build"} & set(path.relative_to(ROOT).parts)
)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_in_backticks_lead_somewhere(page):
    for target in PATH.findall(page.read_text(encoding="utf-8")):
        places = ROOT, page.parent, ROOT / "keras_bn"
        assert any((place / target).exists() for place in places), target


def test_each_rule_of_the_diagnosis_has_its_section_in_the_faq():
    headings = re.findall(r"^### (.+)$", (ROOT / "docs/faq.md").read_text(), re.M)
    anchors = [heading.lower().replace(" ", "-") for heading in headings]
    assert [rule.anchor for rule in RULES.values()] == [
        anchor for anchor in anchors if anchor.startswith("bn0")
    ]
