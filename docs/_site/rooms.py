"""The list of the files in `docs/architecture.md`, made from their docstrings.

`python docs/_site/rooms.py` writes it into the page.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
# What says nothing by itself.
LEFT_OUT = {"__init__.py", "__main__.py", "version.py"}
WIDTH = 26  # of the names; one longer name does not move all the others
LIST = re.compile(r"(?<=^## The rooms\n\n)```\n.*?^```\n", re.M | re.S)


def about(path):
    """The first sentence of the docstring of a module, as one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def lines(folder, depth=1):
    """Pairs of a name, indented, and what it is about; files before folders."""
    files = [path for path in folder.glob("*.py") if path.name not in LEFT_OUT]
    folders = [path.parent for path in folder.glob("*/__init__.py")]
    for path in sorted(files):
        yield "  " * depth + path.name, about(path)
    for path in sorted(folders):
        yield "  " * depth + f"{path.name}/", about(path / "__init__.py")
        yield from lines(path, depth + 1)


def listed():
    """The list as a block of Markdown."""
    rows = [f"{name:{WIDTH}}  {words}" for name, words in lines(ROOT / "keras_bn")]
    return "\n".join(["```", "keras_bn/", *rows, "```", ""])


def written(page):
    """The text of the page with the list of the present files."""
    assert LIST.search(page), "the page has no list to replace"
    return LIST.sub(lambda _: listed(), page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
