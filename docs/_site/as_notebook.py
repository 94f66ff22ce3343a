"""A page of Markdown as a Jupyter notebook: `make docs` writes the tutorial's.

The page stays the source. Its blocks of Python become cells of code, all else cells of
text. As a script, this runs the tutorial in a kernel of its own and writes
docs/tutorial.ipynb with what the cells print and show.
"""

import ast
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).parents[1]
PAGE = DOCS / "tutorial.md"
NOTEBOOK = DOCS / "tutorial.ipynb"

INSTALL = """\
# Installs keras_bn where it is missing, as in Colab. Does nothing where it is there.
import importlib.util

if importlib.util.find_spec("keras_bn") is None:
    %pip install --quiet "keras_bn[examples]"  # before its release: from a checkout

# Figures appear below the cells that draw them.
%matplotlib inline
"""

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a block prints, as the page states it: indented, directly below the block.
PRINTED = re.compile(r"\A\s*\n(?: {4}.*\n)+")
PICTURE = re.compile(r"^!\[[^\]]*\]\((?!\w+:)[^)]*\)\n", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)[^)]*\)")


def displayed(code):
    """The code with a last line `print(x)` as `x`, which a notebook displays.

    Only where x is a name or a call: these may be objects that display themselves.
    """
    last = ast.parse(code).body[-1]
    match last:
        case ast.Expr(
            ast.Call(ast.Name("print"), [ast.Name() | ast.Call() as shown], [])
        ):
            before = "".join(code.splitlines(keepends=True)[: last.lineno - 1])
            return before + ast.get_source_segment(code, shown)
    return code.rstrip("\n")


def text_cells(text):
    """The cells of the text between two blocks: none where it is empty.

    Relative links and pictures lead nowhere from a file that was downloaded: of links
    the text stays, and pictures are left out, for the cells show their own.
    """
    text = LINK.sub(r"\1", PICTURE.sub("", text))
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    return [new_markdown_cell(text)] if text else []


def as_notebook(page):
    """The notebook of a page, not executed.

    Args:
        page: Markdown with blocks of Python.

    Returns:
        A notebook; the same page gives the same one, identifiers of cells included.
    """
    # Texts and codes in turn, a text first and last.
    first, *rest = BLOCK.split(page)
    title, heading, first = first.partition("\n## ")
    cells = [*text_cells(title), new_code_cell(INSTALL.rstrip("\n"))]
    cells += text_cells(heading + first)
    for code, text in zip(rest[::2], rest[1::2], strict=True):
        cells.append(new_code_cell(displayed(code)))
        cells += text_cells(PRINTED.sub("", text))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def execute(notebook, folder):
    """Run a notebook in a kernel of its own, in place.

    Args:
        notebook: the notebook; its cells get their outputs, without what is written to
            stderr: start-up notices of libraries, which name the machine.
        folder: path of the folder in which the cells read and write files.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute(env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if output.get("name") != "stderr"
            ]


def of_the_site(page, executed=NOTEBOOK):
    """The text of the notebook for the site.

    Args:
        page: Markdown of the tutorial.
        executed: path of the notebook that `make docs` wrote.

    Returns:
        The executed notebook if its cells are those of the page as it is now, else
        one without outputs.
    """
    fresh = as_notebook(page)
    if executed.exists():
        old = nbformat.read(executed, as_version=4)
        if [cell.source for cell in old.cells] == [cell.source for cell in fresh.cells]:
            fresh = old
    return nbformat.writes(fresh)


def main():
    notebook = as_notebook(PAGE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, folder)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(DOCS.parent)}: {len(notebook.cells)} cells, executed")


if __name__ == "__main__":
    main()
