"""Commands run without the start-up notices of TensorFlow and Keras.

TensorFlow prints a dozen lines when it is imported. TF_CPP_MIN_LOG_LEVEL alone does not
stop those that it writes while its libraries are being loaded, so stderr is held back
meanwhile. This is done by the command line only: programs that import keras_bn keep
their logging.
"""

import contextlib
import logging
import os
import signal
import sys
import threading

from keras_bn.cli.errors import UsageError
from keras_bn.importing import import_keras as import_or_explain
from keras_bn.pages.streams import stderr_held_back


def import_keras(program):
    """Import Keras and its backend.

    Args:
        program: its name, for what Ctrl-C prints.

    Raises:
        UsageError: if the backend is not installed.
    """
    if "keras" in sys.modules:
        return
    # Whoever sets it to 0 wants to see everything.
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        if level == "0":
            with _interruptible(program, 2):
                import_or_explain()
        else:
            with stderr_held_back() as stderr, _interruptible(program, stderr):
                import_or_explain()
    except ImportError as error:
        # Other failures need their traceback.
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def _interruptible(program, stderr):
    """On Ctrl-C, print one line and end the process.

    An exception would not do: modules that are being imported may catch it, or turn it
    into another one. Nothing has been written yet that would have to be removed.

    Args:
        program: the name to print.
        stderr: a file descriptor to print it to, or None.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame):
        if stderr is not None:
            os.write(stderr, f"{program}: interrupted\n".encode())
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def errors_alone():
    """Drop what TensorFlow and Keras log that is no error.

    Keras logs through absl, such as that the format of a file is old.
    """
    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
