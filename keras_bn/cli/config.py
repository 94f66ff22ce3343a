"""`[tool.keras-bn]` in `pyproject.toml`: defaults of `inspect` and `check`."""

import re
import sys
from argparse import ArgumentTypeError
from pathlib import Path

from keras_bn.cli.arguments import FORMATS, at_least
from keras_bn.cli.errors import UsageError
from keras_bn.diagnosis.rules import SEVERITIES

# What may stand there, and its type: nothing that runs code or writes a file.
_KEYS = {
    "batch-size": at_least(1),
    "exit-zero": bool,
    "fail-on": SEVERITIES,
    "format": FORMATS,
    "ignore": list,
    "quiet": bool,
    "select": list,
    "steps": at_least(1),
}


def configuration():
    """The defaults in the nearest `pyproject.toml` that has any, by option.

    Raises:
        UsageError: for a key or a value that is none.
    """
    folder = Path.cwd()
    for parent in (folder, *folder.parents):
        file = parent / "pyproject.toml"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        # Most of these files have nothing for us, and need not be right.
        if "keras-bn" in text and (table := _table(file, text)) is not None:
            return _checked(file, table)
    return {}


def _table(file, text):
    """The table of a file, however TOML writes it; None if it has none."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        tools = tomllib.loads(text).get("tool")
    except tomllib.TOMLDecodeError as error:
        if re.search(r"^\s*\[tool\.keras-bn\]", text, re.MULTILINE):
            raise UsageError(f"{file} is not valid TOML: {error}") from error
        return None
    table = tools.get("keras-bn") if isinstance(tools, dict) else None
    if table is not None and not isinstance(table, dict):
        raise UsageError(f"{file}: tool.keras-bn must be a table, not {table!r}")
    return table


def _checked(file, table):
    defaults = {}
    for key, value in table.items():
        where = f"{file}: [tool.keras-bn]"
        if key not in _KEYS:
            raise UsageError(f"{where} takes {', '.join(_KEYS)}, not {key}")
        if reason := _wrong(_KEYS[key], value):
            raise UsageError(f"{where} {key} {reason}, not {value!r}")
        defaults[key.replace("-", "_")] = value
    return defaults


def _wrong(kind, value):
    """What a value must be, if it is not that."""
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if kind is list:
        right = isinstance(value, list) and all(isinstance(v, str) for v in value)
        return None if right else "must be a list of rules"
    if isinstance(kind, tuple):
        return None if value in kind else f"must be one of {', '.join(kind)}"
    try:
        right = type(value) is int and kind(str(value)) == value
    except ArgumentTypeError:
        right = False
    return None if right else "must be a whole number, 1 or greater"
