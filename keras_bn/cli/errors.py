"""Errors and warnings of a command: each becomes one sentence."""

import contextlib
import warnings
from pathlib import Path

from keras_bn.pages.plain import sentence

_PACKAGE = Path(__file__).parents[1]


class UsageError(Exception):
    """A request that cannot be done; the message says why in one sentence.

    `cli.main` prints it and ends with exit status 2.
    """


@contextlib.contextmanager
def refused(*kinds, saying=""):
    """Turn errors of these kinds into a `UsageError`.

    Args:
        *kinds: classes of exceptions; `Exception` for other people's code, which may
            raise anything for bad input.
        saying: text before the error's own sentence, unless it begins so.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        message = sentence(error)
        raise UsageError(
            message if message.startswith(saying) else saying + message
        ) from error


@contextlib.contextmanager
def warning_texts():
    """Collect the warnings of keras_bn, and drop those of Keras and others.

    Yields:
        A list, which is filled when the context ends.
    """
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    notes += [
        str(warning.message)
        for warning in caught
        if issubclass(warning.category, UserWarning)
        and _PACKAGE in Path(warning.filename).parents
    ]
