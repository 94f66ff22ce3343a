"""The command line runs without TensorFlow's start-up notices.

TensorFlow prints a dozen lines when it is imported, which happens with this package and
before any command can run. So `keras_bn/__init__.py` imports this module first. If the
process is the command line, it imports Keras, and TensorFlow with it, with stderr held
back: TF_CPP_MIN_LOG_LEVEL alone does not stop lines that TensorFlow writes while its
libraries are being loaded. Programs that import keras_bn keep their logging.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path


def is_command_line() -> bool:
    """Whether this process is `keras-bn` or `python -m keras_bn`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # until Python has found the module that it is to run
        return "keras_bn" in sys.orig_argv
    return Path(program).stem == "keras-bn"


@contextlib.contextmanager
def stderr_held_back():
    """Drop what is written to stderr, by libraries in C++ too; if it fails, show it."""
    if sys.stderr is None:  # it is closed
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    failed = True
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            if failed:
                held.seek(0)
                os.write(2, held.read())


# Who sets the variable wants to see something.
if is_command_line() and "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    with stderr_held_back():
        from keras_bn import backend  # noqa: F401  # it imports Keras
