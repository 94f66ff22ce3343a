"""Holding back what libraries write to stderr."""

import contextlib
import os
import sys
import tempfile


@contextlib.contextmanager
def stderr_held_back():
    """Drop what is written to stderr, by libraries in C++ too; if it fails, show it.

    Yields:
        A file descriptor that writes to the real stderr; None if stderr is closed.
    """
    if sys.stderr is None:
        yield None
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    failed = True
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield stderr
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            if failed:
                held.seek(0)
                os.write(2, held.read())
