"""A Keras that nobody has seen yet: all private names in it are others.

It works as the installed one does. Only who uses its private names finds nothing.
"""

import re
import shutil
from pathlib import Path

import keras

from keras_bn.surgery import private


def make(folder):
    """Write a copy of the installed Keras, in which every private name is another.

    Args:
        folder: to put on the path, in front of the installed Keras.
    """
    source = Path(keras.__file__).parent
    target = Path(folder) / "keras"
    tests = shutil.ignore_patterns("*_test.py", "__pycache__")
    shutil.copytree(source, target, ignore=tests)
    (target / "src").rename(target / "inside")
    names = {name for each in private.NAMES for name in [each.name.rpartition(".")[2]]}
    names |= {"_keras_mask"}
    words = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    for path in target.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        text = words.sub(r"\1_renamed", text.replace("keras.src", "keras.inside"))
        path.write_text(text, encoding="utf-8")
