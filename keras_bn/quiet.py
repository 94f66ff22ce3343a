"""The command line runs without TensorFlow's start-up notices.

TensorFlow prints a dozen lines when it is imported, unless TF_CPP_MIN_LOG_LEVEL is set
by then. It is imported with this package, before any command can run. So
`keras_bn/__init__.py` imports this module first, and the module sets the variable if
the process is the command line. Programs that import keras_bn keep their logging.
"""

import os
import sys
from pathlib import Path


def is_command_line() -> bool:
    """Whether this process is `keras-bn` or `python -m keras_bn`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # until Python has found the module that it is to run
        return "keras_bn" in sys.orig_argv
    return Path(program).stem == "keras-bn"


if is_command_line():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
