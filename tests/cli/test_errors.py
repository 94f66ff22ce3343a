"""What a command says of an error."""

import keras
import numpy as np
import pytest

from keras_bn.cli.errors import UsageError, refused, sentence

WRAPPED = (
    "<class 'A'> could not be deserialized properly.\n\nconfig={'a': 1}.\n\n"
    "Exception encountered: <class 'B'> could not be.\n\nconfig={}.\n\n"
    "Exception encountered: No class 'C'. Import it. Full object config: {'c': 3}"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("Not this."), "Not this."),
        (ValueError("First.\nSecond."), "First."),
        (TypeError(WRAPPED), "No class 'C'. Import it."),
        (OSError(28, "No space left"), "no space left"),
        (ValueError("A total of 2 … for object <A>:\n\nA is bad.\n"), "A is bad."),
        (ValueError(), "ValueError()"),
        (KeyError("keras_version"), "KeyError: 'keras_version'"),
        (AttributeError("no 'pop'"), "AttributeError: no 'pop'"),
        (IsADirectoryError(21, "Is a directory", "/x/.hidden"), "is a directory"),
        (RuntimeError("{{node a/b}} Label 7.  Values: 7 7 [Op:A] name:"), "Label 7"),
        (RuntimeError("\n \n"), "RuntimeError('\\n \\n')"),
    ],
)
def test_a_sentence(error, said):
    assert sentence(error) == said


def test_the_sentence_of_a_failed_call():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="Exception encountered") as raised:
        model(np.ones((2, 5)))
    assert "incompatible" in sentence(raised.value)
    assert "\x1b" not in sentence(raised.value)


def test_what_is_refused():
    with pytest.raises(UsageError, match=r"^a: no$"), refused(OSError, saying="a: "):
        raise OSError("no")
    with pytest.raises(KeyError), refused(OSError):
        raise KeyError("another fault")
    with pytest.raises(UsageError, match=r"^as it is$"), refused(Exception, saying="b"):
        raise UsageError("as it is")
