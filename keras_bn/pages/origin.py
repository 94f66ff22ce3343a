"""Where a result comes from: of which file and data, when, with which versions."""

import sys
from datetime import datetime
from typing import NamedTuple

import keras

from keras_bn.version import __version__


class Origin(NamedTuple):
    """Where a report comes from, to say on its page.

    Args:
        time: when it was made, as `"2026-11-28 16:30+00:00"`.
        versions: of what it was made with, as `"Keras 3.15.1"`.
        file: of the model, if it comes from one.
        data: the file or the kind of the data, if there is any.
    """

    time: str
    versions: tuple[str, ...]
    file: str | None = None
    data: str | None = None

    def lines(self) -> list[str]:
        """The lines of the page about it."""
        pairs = ("Model", self.file), ("Data", self.data)
        lines = [f"{what}: {name}" for what, name in pairs if name]
        return [*lines, ", ".join([self.time, *self.versions])]


def origin_of(data):
    """The `Origin` of a report that is made now.

    Args:
        data: what it was made on; None if there is none.
    """
    backend = keras.backend.backend()
    version = getattr(sys.modules.get(backend), "__version__", "")
    versions = f"keras_bn {__version__}", f"Keras {keras.__version__}"
    return Origin(
        datetime.now().astimezone().isoformat(" ", "minutes"),
        (*versions, f"{backend} {version}".strip()),
        data=None if data is None else _kind(data),
    )


def _kind(data):
    """What some data is, in words."""
    if isinstance(data, tuple):
        return ", ".join(_kind(part) for part in data if part is not None)
    shape = getattr(data, "shape", None)
    if shape is None:
        return type(data).__name__
    return f"{type(data).__name__} {tuple(shape)}"
