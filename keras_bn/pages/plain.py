"""Results as lines of text, and in the types of JSON."""

import math


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
