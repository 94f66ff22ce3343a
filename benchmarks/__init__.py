"""Side-by-side timings: `python -m benchmarks`, or one module alone."""

import contextlib
import sys

# PyTorch may bring triton, whose import after TensorFlow ends the process: before it.
if "tensorflow" not in sys.modules:
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
