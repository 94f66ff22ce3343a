"""Writing a file completely or not at all, and never over another by accident."""

import os
from pathlib import Path


def check_writable(file, force):
    """Refuse early a file that cannot or must not be written.

    Args:
        file: a path.
        force: whether an existing file may be overwritten.

    Raises:
        OSError: with the reason.
    """
    path = Path(file).resolve()
    if not path.parent.is_dir():
        raise OSError(f"there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise OSError(f"{file} is not a regular file")
    if path.exists() and not force:
        raise OSError(f"{file} exists; --force overwrites it")
    if not os.access(path.parent, os.W_OK):
        raise OSError(f"the folder {path.parent} can't be written to")


def write_whole(file, write, force=False):
    """Write a file under a temporary name, and rename it when it is complete.

    Args:
        file: a path.
        write: `write(path)`, which writes a file of the same suffix at `path`.
        force: as in `check_writable`.

    Raises:
        OSError: if it can't be written.
    """
    check_writable(file, force)
    path = Path(file).resolve()
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
