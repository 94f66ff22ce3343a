"""The output of a command: tables, JSON, files."""

import json
import math

from rich.console import Console

from keras_bn.cli.errors import refused
from keras_bn.pages import files, plain
from keras_bn.pages.plain import escaped


def console(arguments) -> Console:
    """Where a command prints: on stderr if its JSON goes to stdout."""
    return Console(stderr=arguments.json == "-", highlight=False, quiet=arguments.quiet)


def show(arguments, results, header, rows, lines, words=()):
    """Print a table and the lines below it, and write the JSON.

    Args:
        arguments: of the command.
        results: the content of the JSON, in plain types.
        header, rows: of the table, strings.
        lines: the text below the table.
        words: the titles of columns that may be broken.
    """
    place = console(arguments)
    line, header, rows = plain.common(header, rows)
    above = [escaped(line), ""] if line else []
    table = plain.lines(plain.table(header, rows, words), place)
    # Warnings among the lines name layers and files.
    for text in [*above, *table, "", *map(escaped, lines)]:
        place.out(text, highlight=False)
    write_json(arguments, results)


def write_json(arguments, results):
    """Write the results where `--json` says; NaN and infinity become null."""
    if arguments.json is None:
        return
    text = json.dumps(_finite(results), indent=1, allow_nan=False) + "\n"
    if arguments.json == "-":
        print(text, end="")
    else:
        write(
            arguments,
            arguments.json,
            lambda path: path.write_text(text, encoding="utf-8"),
        )


def write(arguments, file, write_to):
    """Write a file, completely or not at all.

    Args:
        arguments: of the command.
        file: its path.
        write_to: `write_to(path)`, which writes a file of the same suffix at `path`.
    """
    # Writing a model or a figure may raise anything.
    with refused(Exception, saying=f"{file} can't be written: "):
        files.write_whole(file, write_to, arguments.force)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
