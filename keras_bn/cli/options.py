"""Options that several commands have."""

import argparse
import math


def add_json(parser):
    """Add `--json` and `--force`."""
    parser.add_argument(
        "--json", metavar="FILE", help='write the results to a file; "-" for stdout'
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def at_least(least, kind=int):
    """The type of an option that takes a finite number, `least` or greater.

    Args:
        least: the smallest number.
        kind: int or float.

    >>> at_least(1)("32"), at_least(0, float)("0.5")
    (32, 0.5)
    """

    def parse(text):
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"must be {what}, {least} or greater, not {text!r}"
            )
        return number

    return parse
