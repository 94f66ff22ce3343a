"""Results as lines of text, and in the types of JSON."""

import math
import re

# Keras's text around the cause of an error.
_BEFORE = "Exception encountered: "
_HEADINGS = ("Exception encountered when calling ", "A total of ")
_AFTER = " Full object config: "
_BOLD = re.compile(r"\x1b\[\d*m")


def table(header, rows, left=1):
    """The lines of a table.

    Args:
        header: its rows of titles.
        rows: its rows, of strings.
        left: how many columns stand to the left; the others, of numbers, to the right.
    """
    every = [*header, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(header[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    ]
    lines.insert(len(header), "  ".join("-" * width for width in widths))
    return lines


def number(value):
    """A number as a float; None for NaN, infinity and None."""
    return None if value is None or not math.isfinite(value) else float(value)


def sentence(error) -> str:
    """The line of an error's message that says what is wrong.

    Keras puts the cause of a failed load at the end, after the configs of all layers
    around it. The cause of a failed call, or of wrong weights, is below a heading.

    >>> sentence(TypeError("Not this.\\n\\nException encountered: No class 'A'."))
    "No class 'A'."
    """
    text = _BOLD.sub("", str(error)).rpartition(_BEFORE)[2]
    lines = [line.strip() for line in text.splitlines()]
    said = [line for line in lines if line and not line.startswith(_HEADINGS)]
    return said[0].partition(_AFTER)[0] if said else repr(error)
