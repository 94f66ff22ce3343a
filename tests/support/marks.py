"""Which of many cases the default run takes; CI takes them all."""

import pytest

from keras_bn.int8 import tflite
from support import backend


def _old_converter():
    if backend.NAME != "tensorflow":
        return False
    version = tuple(map(int, backend.tf.__version__.split(".")[:2]))
    return version < tflite.OLDEST_AWARE


# For tests of `quantize_aware` on TensorFlow.
takes_fake_quantization = pytest.mark.skipif(
    _old_converter(), reason="the converter can't take fake quantization yet"
)


def slow(*values):
    """A case for CI."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(values, fast):
    """All values, but only those of `fast` in the default run."""
    return [value if value in fast else slow(value) for value in values]


def mostly_slow_cases(cases, fast):
    """The same for cases of several values each."""
    return [case if case in fast else slow(*case) for case in cases]
