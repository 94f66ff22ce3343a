"""What is known before Keras is imported: files that are missing or in the way."""

import errno
import os
from pathlib import Path

from keras_bn.cli.arguments import MODEL_SUFFIXES
from keras_bn.cli.errors import UsageError, refused
from keras_bn.diagnosis.rules import ignored_kinds
from keras_bn.pages import files

_FIGURES = (".png", ".svg", ".pdf")
_PAGES = (".html", ".htm")


def check(arguments):
    """Refuse a command that cannot be done.

    Args:
        arguments: of the command, parsed.

    Raises:
        UsageError: with the reason.
    """
    given = vars(arguments)
    ignored(arguments)
    for option in "fix", "plot":
        if given.get(option) is not None and arguments.data is None:
            raise UsageError(f"--{option} needs --data")
    for name in "model", "data":
        if given.get(name) is not None:
            _readable(given[name])
    # What is written, and the suffixes that it may have.
    outputs = {
        "output": given.get("suffixes", ()),
        "fix": MODEL_SUFFIXES,
        "plot": _FIGURES,
        "html": _PAGES,
        "json": (),
    }
    for name, suffixes in outputs.items():
        if (file := given.get(name)) is None or (name, file) == ("json", "-"):
            continue
        if suffixes and Path(file).suffix not in suffixes:
            option = "" if name == "output" else f"--{name} "
            raise UsageError(f"{option}{file} must end in {' or '.join(suffixes)}")
        with refused(OSError):
            files.check_writable(file, arguments.force)


def ignored(arguments):
    """The names that `--ignore` gives, checked."""
    given = ",".join(getattr(arguments, "ignore", [])).split(",")
    names = [name.strip() for name in given if name.strip()]
    try:
        ignored_kinds(names)
    except ValueError as error:
        raise UsageError(f"--ignore: {error}") from error
    return names


def needs_keras(arguments):
    """Whether a command has anything to do that takes Keras."""
    return arguments.command != "check" or any(map(os.path.exists, arguments.models))


def _readable(file):
    path = Path(file)
    if not path.exists():
        raise UsageError(f"there is no file {file}")
    if path.is_dir():
        raise UsageError(f"{file} is a folder, not a file")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{file} can't be read: {os.strerror(errno.EACCES).lower()}")
