"""Scalars in event files, as TensorBoard reads them."""

import time


class Events:
    """An event file in the folder where TensorBoard looks, written as it comes.

    Raises:
        ImportError: without the package `tensorboard`.
    """

    def __init__(self, folder):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer import event_file_writer
        except ImportError as error:
            raise ImportError(
                "Event files are written by the package `tensorboard` on this backend: "
                f"`pip install tensorboard`. Received: log_dir={str(folder)!r}"
            ) from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = event_file_writer.EventFileWriter(str(folder))

    def write(self, step, values):
        """Write the scalars of a step, a dict of numbers by tag, and flush."""
        scalars = [
            self._summary.Value(tag=t, simple_value=v) for t, v in values.items()
        ]
        summary = self._summary(value=scalars)
        now = time.time()
        self._writer.add_event(self._event(wall_time=now, step=step, summary=summary))
        self._writer.flush()

    def close(self):
        """Close the file."""
        self._writer.close()
