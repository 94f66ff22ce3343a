"""The process of a command: its imports, its signals, what libraries print meanwhile.

TensorFlow prints a dozen lines when it is imported. TF_CPP_MIN_LOG_LEVEL alone does not
stop those that it writes while its libraries are being loaded, so stderr is held back
meanwhile. Only the command line does this: programs that import keras_bn keep their
logging.
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
def terminable():
    """Let a signal that ends the process remove unfinished files first.

    The exit status is 128 and the number of the signal, as a shell has it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame):
        raise SystemExit(128 + number)

    names = "SIGTERM", "SIGHUP"  # Windows has only the first
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if handler is signal.SIG_DFL:  # not with `nohup`, which ignores SIGHUP
                signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            if handler is signal.SIG_DFL:
                signal.signal(number, handler)


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
