"""Errors and warnings of a command: each becomes one sentence."""

import contextlib
import re
import warnings
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]

# Keras's text around the cause of an error.
_BEFORE = "Exception encountered: "
_HEADINGS = ("Exception encountered when calling ", "A total of ")
_AFTER = " Full object config: "
_BOLD = re.compile(r"\x1b\[\d*m")


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
        said = sentence(error)
        raise UsageError(said if said.startswith(saying) else saying + said) from error


@contextlib.contextmanager
def noted():
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


def sentence(error) -> str:
    """The line of an error's message that says what is wrong.

    Keras puts the cause of a failed load at the end, after the configs of all layers
    around it. The cause of a failed call, or of wrong weights, is below a heading.

    >>> sentence(TypeError("Not this.\\n\\nException encountered: No class 'A'."))
    "No class 'A'."
    """
    text = _BOLD.sub("", str(error)).rpartition(_BEFORE)[2]
    lines = [line.strip() for line in text.splitlines()]
    said = [line for line in lines if line and not line.startswith(_HEADINGS)]
    return said[0].partition(_AFTER)[0] if said else repr(error)
