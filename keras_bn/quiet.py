"""The command line runs without TensorFlow's start-up notices.

TensorFlow prints a dozen lines when it is imported, which happens with this package and
before any command can run. So `keras_bn/__init__.py` imports this module first. If the
process is the command line, it imports Keras, and TensorFlow with it, with stderr held
back: TF_CPP_MIN_LOG_LEVEL alone does not stop lines that TensorFlow writes while its
libraries are being loaded. Programs that import keras_bn keep their logging.

A backend that is not installed ends the command line here with a sentence.
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


def import_keras():
    """Import Keras; exit with status 2 and a sentence if its backend is missing."""
    try:
        from keras_bn import backend  # noqa: F401
    except ImportError as error:
        # Other failures need their traceback.
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        print(f"keras-bn: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if is_command_line():
    # Who sets the variable wants to see something.
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        import_keras()
    else:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        with stderr_held_back():
            import_keras()
