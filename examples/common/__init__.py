"""What the equivalence examples share: data, two trainings side by side, the report.

Imported before Keras, this also loads TensorFlow without its start-up messages.
"""

import contextlib
import logging
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _silent_stderr():
    """Drop what C++ libraries print while they load, before they read any setting."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


with _silent_stderr():
    # PyTorch may bring triton, whose import after TensorFlow ends the process.
    if "tensorflow" not in sys.modules:
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401
    import keras  # noqa: F401

# That there is a prediction function per model is no sign of needless retracing.
logging.getLogger("tensorflow").setLevel(logging.ERROR)
