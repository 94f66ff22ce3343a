"""How results show themselves: in a notebook, and as a page of HTML that loads nothing.

A fragment brings its style along. The style holds within `class="keras-bn"` only, and
is light or dark as the notebook or the system is.
"""

import math
import re
import tempfile
import warnings
import webbrowser
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path

from keras_bn.version import __version__


@cache
def _style():
    return files("keras_bn.pages").joinpath("display.css").read_text(encoding="utf-8")


def fragment(body):
    """HTML to display among other HTML, as the output of a cell of a notebook.

    Args:
        body: the HTML within.
    """
    return f'<div class="keras-bn cell">\n<style>\n{_style()}</style>\n{body}\n</div>\n'


def page(title, body):
    """A whole page.

    Args:
        title: its title, as plain text.
        body: the HTML of its body.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{_style()}</style>
</head>
<body class="keras-bn-page">
<div class="keras-bn">
<main>
{body}
</main>
<footer>keras_bn {__version__}</footer>
</div>
</body>
</html>
"""


def table(header, rows):
    """A table in HTML.

    Args:
        header: the titles of its columns, in HTML.
        rows: pairs of the attributes of a row and its cells, both in HTML; the first
            cell is the heading of the row.
    """
    head = "".join(f'<th scope="col">{title}</th>' for title in header)
    body = "\n".join(
        f'<tr {attributes}><th scope="row">{first}</th>{"".join(cells)}</tr>'
        for attributes, (first, *cells) in rows
    )
    return (
        '<table class="grid">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    )


def cell(label, content):
    """A cell of a table; on a narrow screen the label is above its content."""
    return f'<td data-label="{escape(label)}">{content}</td>'


def small(content):
    """HTML as the lesser line of a cell."""
    return f"<small>{content}</small>"


def bar(value, full):
    """A number, 0 or greater, as a bar that is full at `full` and beyond."""
    share = min(value / full, 1.0) if math.isfinite(value) else 1.0
    return f'<div class="bar"><div style="width:{share:.0%}"></div></div>'


def opened(text, name):
    """Write a page to a temporary file and show it in the browser.

    Args:
        text: the page.
        name: for the name of the file.

    Returns:
        The path of the file.

    Warns:
        UserWarning: if there is no browser.
    """
    folder = Path(tempfile.mkdtemp(prefix="keras_bn-"))
    path = folder / f"{re.sub(r'[^0-9A-Za-z_.-]+', '-', name)}.html"
    path.write_text(text, encoding="utf-8")
    if not webbrowser.open(path.as_uri()):
        warnings.warn(f"No browser could be started. The page is {path}", stacklevel=3)
    return path
