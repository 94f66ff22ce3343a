"""Results as lines of text, and in the types of JSON."""

import math
import re

# Keras's text around the cause of an error.
_BEFORE = "Exception encountered: "
_HEADINGS = ("Exception encountered when calling ", "A total of ")
_AFTER = " Full object config: "
_BOLD = re.compile(r"\x1b\[\d*m")
# TensorFlow's names of the operation that failed, before and after its message.
_OPERATION = re.compile(r"^\{\{.*?\}\} ?| ?\[Op:.*$")
# Their messages, such as "'shape'", are no sentences without the class.
_BUGS = (LookupError, AttributeError, AssertionError, NameError, ArithmeticError)
# What the runners of GitHub, Azure and TeamCity take for a command: "::" at the start
# of a line, "##[" and "##vso[" anywhere.
_COMMANDS = re.compile(r"^(\s*):(?=:)|#(?=#\w*\[)")


def escaped(text):
    r"""Text of others, such as the name of a layer, as one line of harmless characters.

    What cannot be printed is shown as Python writes it, and nothing in it is a command
    to a terminal or to the runner of a build.

    >>> print(escaped("bn\n::error::no\x1b[2J"), escaped("::error::no"))
    bn\n::error::no\x1b[2J \x3a:error::no
    """
    shown = printable(str(text))
    return _COMMANDS.sub(lambda m: f"{m[1] or ''}\\x{ord(m[0][-1]):02x}", shown)


def printable(text):
    """Text with what cannot be printed as Python writes it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def box():
    """A rule under the titles and nothing else, in characters that any terminal has."""
    from rich.box import Box

    return Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def table(header, rows, words=()):
    """A table of rich's, in which no name and no number is ever broken.

    Args:
        header: the titles of its columns; a title may have several lines.
        rows: lists of strings, or of rich's texts.
        words: the titles of columns of running text, which may be broken.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    rows = [[c if isinstance(c, Text) else Text(escaped(c)) for c in r] for r in rows]
    grid = Table(box=box(), show_edge=False, pad_edge=False, collapse_padding=True)
    height = max(title.count("\n") for title in header)
    for i, title in enumerate(header):
        cells = [row[i].plain for row in rows]
        whole = title not in words
        longest = max(map(cell_len, [*title.split("\n"), *cells]))
        grid.add_column(
            "\n" * (height - title.count("\n")) + title,
            justify="right" if all(map(_NUMBER.fullmatch, cells)) else "left",
            no_wrap=whole,
            min_width=longest if whole else min(longest, _LEAST_WORDS),
        )
    for row in rows:
        grid.add_row(*row)
    return grid


_LEAST_WORDS = 24  # columns of running text are not made narrower than this
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?|nan|-?inf|-|")


def common(header, rows):
    """What is the same in every row of a table, and the table without it.

    The first column, which names the rows, stays.

    Returns:
        A line of text, empty if nothing is the same, a header and rows.

    >>> common(["layer", "axis"], [["bn_1", "-1"], ["bn_2", "-1"]])
    ('In every row: axis -1', ['layer'], [['bn_1'], ['bn_2']])
    """
    if len(rows) < 2:
        return "", header, rows
    columns = list(zip(*rows, strict=True))
    same = {i for i, column in enumerate(columns) if i and len(set(column)) == 1}
    shared = [f"{header[i]} {columns[i][0]}" for i in sorted(same) if columns[i][0]]
    stay = [i for i in range(len(header)) if i not in same]
    line = f"In every row: {', '.join(shared)}" if shared else ""
    return line, [header[i] for i in stay], [[row[i] for i in stay] for row in rows]


def lines(grid, console=None):
    """The lines of a table.

    Args:
        grid: the table.
        console: where it is printed, for its colors and its width; by default, and
            where that is no terminal, the table is as wide as it needs to be.
    """
    import io

    from rich.console import Console
    from rich.measure import Measurement

    if console is None:
        console = Console(
            file=io.StringIO(),
            color_system=None,
            force_jupyter=False,  # a notebook would show it beside the report
        )
    room = console.options.update(width=10**5)
    fit, before = Measurement.get(console, room, grid), console.width
    wanted = before if console.is_terminal else fit.maximum
    try:
        console.width = max(fit.minimum, wanted)
        with console.capture() as capture:
            console.print(grid)
    finally:
        console.width = before
    return [line.rstrip() for line in capture.get().splitlines()]


def number(value):
    """A number as a float; None for NaN, infinity and None."""
    return None if value is None or not math.isfinite(value) else float(value)


def json(value):
    """A value in types that JSON has: dicts, named tuples too, lists and numbers."""
    if isinstance(value, float):
        return number(value)
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, dict):
        return {name: json(each) for name, each in value.items()}
    return [*map(json, value)] if isinstance(value, list | tuple) else value


def sentence(error) -> str:
    """The line of an error's message that says what is wrong.

    Keras puts the cause of a failed load at the end, after the configs of all layers
    around it. The cause of a failed call, or of wrong weights, is below a heading.

    >>> sentence(TypeError("Not this.\\n\\nException encountered: No class 'A'."))
    "No class 'A'."
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = _BOLD.sub("", str(error)).rpartition(_BEFORE)[2]
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_HEADINGS)]
    if not lines:
        return repr(error)
    line = lines[0].partition(_AFTER)[0]
    if _OPERATION.search(line):  # its further sentences list the values
        line = _OPERATION.sub("", line).partition(".  ")[0]
    if isinstance(error, _BUGS):
        line = f"{type(error).__name__}: {line}"
    return line
