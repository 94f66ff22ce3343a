"""How results show themselves: in a notebook, and as a page that loads nothing.

The HTML is in `templates`. What a notebook shows brings its style along, which holds
within `class="keras-bn"` only, and is light or dark as the notebook or the system is.
"""

import math
import os
import re
import tempfile
import warnings
import webbrowser
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from keras_bn.pages.files import write_whole
from keras_bn.pages.plain import printable
from keras_bn.version import __version__


class Content(NamedTuple):
    """What is shown.

    Args:
        title: of the page, and a part of the name of its file.
        template: the file in `templates` with the HTML of the body.
        context: the variables of the template.
    """

    title: str
    template: str
    context: dict[str, Any]


class Displayed(ABC):
    """A result that shows itself in a notebook and as a page."""

    @abstractmethod
    def _content(self) -> Content: ...

    @abstractmethod
    def _in_a_line(self) -> str: ...

    # IPython shows the text only if both methods are of one class.
    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._in_a_line()}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # what IPython shows in a terminal

    def to_html(self) -> str:
        """One page of HTML that loads nothing; a string."""
        return render("page.html", self._content())

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, over an existing one.

        Args:
            path: of the file.

        Raises:
            OSError: if it cannot be written.
        """
        write(path, self.to_html())

    def open(self) -> Path:
        """Show the page in the browser.

        Returns:
            The path of the page, a temporary file.

        Warns:
            UserWarning: if there is no browser.
        """
        return opened(self.to_html(), self._content().title)

    def _repr_html_(self) -> str:
        return render("cell.html", self._content())


class Section(Displayed):
    """A result that can also be a section at the end of another page."""

    @abstractmethod
    def section(self) -> Content:
        """The section alone, without the heading of the page."""


def render(frame: str, content: Content) -> str:
    """The HTML of some content.

    Args:
        frame: the template around it: `"page.html"` or `"cell.html"`.
        content: what to show.
    """
    return (
        _templates()
        .get_template(frame)
        .render(
            content.context,
            title=content.title,
            body=content.template,
            version=__version__,
        )
    )


@cache
def _templates():
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("keras_bn.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"share": _share, "printable": printable}
    return templates


def _printable(value):
    """What a template shows: names of others without control characters."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return printable(value) if is_text else value


def _share(value, full):
    """A number, 0 or greater, as a share of `full`, at most all of it."""
    share = min(value / full, 1.0) if math.isfinite(value) else 1.0
    return f"{share:.0%}"


def write(path: str | os.PathLike[str], page: str) -> None:
    """Write a page to a file, whole or not at all, over an existing one."""
    write_whole(path, lambda part: part.write_text(page, encoding="utf-8"), force=True)


def opened(page: str, name: str) -> Path:
    """Write a page to a temporary file and show it in the browser.

    Args:
        page: the page.
        name: for the name of the file.

    Returns:
        The path of the file.

    Warns:
        UserWarning: if there is no browser.
    """
    folder = Path(tempfile.mkdtemp(prefix="keras_bn-"))
    path = folder / f"{re.sub(r'[^0-9A-Za-z_.-]+', '-', name)[:80]}.html"
    path.write_text(page, encoding="utf-8")
    if not webbrowser.open(path.as_uri()):
        warnings.warn(f"No browser could be started. The page is {path}", stacklevel=3)
    return path
