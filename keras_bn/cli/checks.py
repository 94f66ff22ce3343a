"""What is known before Keras is imported: files that are missing or in the way."""

import errno
import os
import stat
from pathlib import Path

from keras_bn.cli.arguments import MODEL_SUFFIXES
from keras_bn.cli.errors import UsageError, refused
from keras_bn.cli.rule import rules
from keras_bn.pages import files

_FIGURES = (".png", ".svg", ".pdf")
_PAGES = (".html", ".htm")
_FORMS = (
    "; --data takes an .npz or .npy file, a folder of images, a folder of "
    "tf.data.Dataset.save, or module:function"
)


def check(arguments):
    """Refuse a command that cannot be done.

    Args:
        arguments: of the command, parsed.

    Raises:
        UsageError: with the reason.
    """
    values = vars(arguments)
    for option in "ignore", "select", "rules":
        rules(values.get(option, []), "it" if option == "rules" else f"--{option}")
    for option in "fix", "plot":
        if values.get(option) is not None and arguments.data is None:
            raise UsageError(f"--{option} needs --data")
    if values.get("model") is not None:
        check_file(values["model"])
    if values.get("data") is not None:
        _check_data(arguments)
    # What is written, and the suffixes that it may have.
    outputs = {
        "output": values.get("suffixes", ()),
        "fix": MODEL_SUFFIXES,
        "plot": _FIGURES,
        "html": _PAGES,
        "json": (),
    }
    for name, suffixes in outputs.items():
        if (file := values.get(name)) is None or (name, file) == ("json", "-"):
            continue
        if suffixes and Path(file).suffix not in suffixes:
            option = "" if name == "output" else f"--{name} "
            raise UsageError(f"{option}{file} must end in {' or '.join(suffixes)}")
        with refused(OSError):
            files.check_writable(file, arguments.force)


def needs_keras(arguments):
    """Whether a command has anything to do that takes Keras."""
    if arguments.command == "check":
        return any(map(os.path.exists, arguments.models))
    return arguments.command != "rule"


def function_name(data):
    """`--data` if it is `module:function` and no file; else None."""
    names = data.split(":")
    right = len(names) == 2 and all(
        part.isidentifier() for name in names for part in name.split(".")
    )
    return data if right and not os.path.exists(data) else None


def _check_data(arguments):
    data = arguments.data
    if function_name(data):
        return
    if not is_folder(data, _FORMS) and Path(data).suffix not in (".npz", ".npy"):
        raise UsageError(f"--data {data} is none of these{_FORMS}")


def check_file(file):
    """Refuse what is no file, or cannot be read.

    Raises:
        UsageError: with the reason.
    """
    if is_folder(file):
        raise UsageError(f"{file} is a folder, not a file")


def is_folder(place, more=""):
    """Whether what is read is a folder and no file.

    Args:
        place: a path.
        more: what to say too if there is nothing.

    Raises:
        UsageError: if there is nothing, or nothing that can be read.
    """
    path = Path(place)
    with refused(OSError, saying=f"{place} can't be read: "):
        try:
            folder = stat.S_ISDIR(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"there is no file {place}{more}") from error
        if not os.access(path, os.R_OK | os.X_OK if folder else os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return folder
