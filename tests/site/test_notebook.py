"""The tutorial as a notebook: its cells, what they show, the copy on the site."""

import contextlib
import importlib.util
import io
import re
import textwrap
from pathlib import Path

import pytest
from conftest import require

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")

PAGE = """\
# Title

Words, and a [page](faq.md#one) and [elsewhere](https://example.org).

## First

```python
a = 1
print(a)
```

    1

Between.

    shown below text

![A picture](pictures/a.png)

```python
b = f(
    a,
)
print(f"{a}")
```

```python
print(
    f(a)
)  # what it prints
```

After.
"""


@pytest.fixture(scope="module")
def as_notebook():
    """The module that makes notebooks."""
    require("nbformat")
    path = ROOT / "docs" / "_site" / "as_notebook.py"
    spec = importlib.util.spec_from_file_location("as_notebook", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_becomes_cells_in_its_order(as_notebook):
    notebook = as_notebook.as_notebook(PAGE)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (
            "markdown",
            "# Title\n\nWords, and a page and [elsewhere](https://example.org).",
        ),
        ("code", as_notebook.INSTALL.rstrip("\n")),
        ("markdown", "## First"),
        ("code", "a = 1\na"),
        ("markdown", "Between.\n\n    shown below text"),
        ("code", 'b = f(\n    a,\n)\nprint(f"{a}")'),
        ("code", "f(a)"),
        ("markdown", "After."),
    ]
    assert notebook == as_notebook.as_notebook(PAGE)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("print(x)", "x"),
        ("a = 1\nprint(f(a, b=2))\n", "a = 1\nf(a, b=2)"),
        ("print(x, y)", "print(x, y)"),
        ("print(x, end='')", "print(x, end='')"),
        ("print('text')", "print('text')"),
        ("print(x)\ny = 1", "print(x)\ny = 1"),
        ("log(x)", "log(x)"),
    ],
)
def test_a_notebook_displays_what_a_block_prints_last(as_notebook, code, shown):
    assert as_notebook.displayed(code) == shown


def test_the_site_has_the_executed_copy_while_it_is_of_the_page(as_notebook, tmp_path):
    import nbformat

    path = tmp_path / "page.ipynb"
    assert as_notebook.of_the_site(PAGE, path).count('"outputs": []') == 4
    executed = as_notebook.as_notebook(PAGE)
    executed.cells[3].outputs = [nbformat.v4.new_output("stream", text="1 again")]
    nbformat.write(executed, path)
    assert '"1 again"' in as_notebook.of_the_site(PAGE, path)
    changed = as_notebook.of_the_site(PAGE.replace("a = 1", "a = 2"), path)
    assert "again" not in changed
    assert "a = 2" in changed


def test_what_fails_in_a_cell_fails(as_notebook, tmp_path):
    exceptions = require("nbclient").exceptions
    require("ipykernel")
    notebook = as_notebook.as_notebook("# T\n\n```python\nassert 1 > 2\n```\n")
    del notebook.cells[1]
    with pytest.raises(exceptions.CellExecutionError, match="assert 1 > 2"):
        as_notebook.execute(notebook, tmp_path)


# A block of Python, and the indented lines right below it, which are what it prints.
PRINTED = re.compile(
    r"^```python\n(.*?)^```\n(?:\n((?:    [^\n]*\n|\n)+))?", re.M | re.S
)


def shape_of(text):
    """The words of a text; numbers may be other ones on another machine."""
    # So may the numbers at the end of names that Keras gives.
    text = re.sub(r"_\d+\b", "", " ".join(text.split()))
    return re.sub(r"\d[\d,.]*", "#", text)


def test_what_the_tutorial_shows_is_what_its_blocks_print(tmp_path, monkeypatch):
    for package in ("matplotlib", "sklearn"):
        require(package)
    monkeypatch.chdir(tmp_path)
    namespace, compared = {}, 0
    for code, shown in PRINTED.findall(TUTORIAL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "tutorial.md", "exec"), namespace)
        if shown and shown.strip():
            printed = textwrap.indent(out.getvalue(), "    ")
            assert shape_of(shown) == shape_of(printed), f"it prints:\n{printed}"
            compared += 1
    assert compared == 4


@pytest.mark.slow
def test_the_tutorial_runs_in_a_kernel_and_shows_its_report(as_notebook, tmp_path):
    for package in ("nbclient", "ipykernel", "matplotlib", "sklearn"):
        require(package)
    notebook = as_notebook.as_notebook(TUTORIAL)
    as_notebook.execute(notebook, tmp_path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) == TUTORIAL.count("```python\n") + 1
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]

    def shown(end):
        """What the cell whose code ends so displays, by type."""
        (cell,) = (cell for cell in cells if cell.source.endswith(end))
        (output,) = cell.outputs
        return output.data

    for end, words in (
        ("\nreport", ("momentum-too-slow", "<svg")),
        ("plan_fold(ours)", ("conv2d_1", "<table")),
    ):
        page = shown(end)["text/html"]
        assert page.startswith('<div class="keras-bn cell">')
        for word in words:
            assert word in page
    assert "image/png" in shown('report.plot("before.png")')
    # Files go where the notebook runs.
    for name in ("before.png", "drift.csv", "drift.png", "digits.keras", "digits"):
        assert (tmp_path / name).exists(), name
    # Nothing of this machine is in what readers download.
    assert str(ROOT) not in as_notebook.nbformat.writes(notebook)
