"""Which of many cases the default run takes; CI takes them all."""

import pytest


def slow(*values):
    """A case for CI."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(values, fast):
    """All values, but only those of `fast` in the default run."""
    return [value if value in fast else slow(value) for value in values]


def mostly_slow_cases(cases, fast):
    """The same for cases of several values each."""
    return [case if case in fast else slow(*case) for case in cases]
