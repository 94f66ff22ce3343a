"""Writing a file completely or not at all, and never over another by accident."""

import os
import stat
import tempfile
from pathlib import Path


def check_writable(file, force):
    """Refuse early a file that cannot or must not be written.

    Args:
        file: a path.
        force: whether an existing file may be overwritten.

    Raises:
        OSError: with the reason.
    """
    path = Path(os.path.realpath(file))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:  # such as a name that is too long
        raise OSError(f"{file} can't be written: {error.strerror}") from error
    if not path.parent.is_dir():
        raise OSError(f"there is no folder {path.parent}")
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(f"{file} is not a regular file")
    if mode is not None and not force:
        raise _exists(file)
    if not os.access(path.parent, os.W_OK):
        raise OSError(f"the folder {path.parent} can't be written to")


def write_whole(file, write, force=False):
    """Write a file in a hidden folder next to it, and move it when it is complete.

    A file that it replaces gives it its mode. One that has appeared in the meantime is
    replaced only with `force`. Several threads and processes may write the same file:
    one of them is there in the end, whole.

    Args:
        file: a path.
        write: `write(path)`, which writes a file of the same name at `path`.
        force: as in `check_writable`.

    Raises:
        OSError: if it can't be written; the message names `file`.
    """
    check_writable(file, force)
    path = Path(os.path.realpath(file))
    try:
        with tempfile.TemporaryDirectory(
            prefix=".keras_bn-", dir=path.parent, ignore_cleanup_errors=True
        ) as folder:
            part = Path(folder, path.name)
            write(part)
            if path.exists():
                part.chmod(path.stat().st_mode)
            if force:
                part.replace(path)
            else:
                _move_to_free(part, path, file)
    except OSError as error:
        if not error.strerror and str(part) not in str(error):
            raise
        reason = error.strerror or str(error).replace(str(part), str(file))
        raise OSError(f"{file} can't be written: {reason}") from error


def _move_to_free(part, path, file):
    """Move a file where there is none, at once."""
    try:
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links: take the name, then replace it
            path.open("x").close()
            part.replace(path)
    except FileExistsError:
        raise _exists(file) from None


def _exists(file):
    return OSError(f"{file} exists; --force overwrites it")
