"""Scalars in event files, as TensorBoard reads them."""

import os


class Events:
    """An event file in the folder where TensorBoard looks, written as it comes.

    Raises:
        ImportError: without the package `tensorboard`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            raise ImportError(
                "Event files are written by the package `tensorboard`: "
                f"`pip install tensorboard`. Received: log_dir={str(folder)!r}"
            ) from error
        self._writer = Writer(str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the scalars of a step, a dict of numbers by tag, and flush."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
