"""A progress bar that says what is going on, on stderr."""

import sys
import time

_WIDTH = 24


class Progress:
    """A labelled progress bar.

    On a terminal it is drawn again with every step; elsewhere it is one line when all
    is done, or with "auto" nothing.

    Args:
        label: what is going on, such as "recalibrating".
        total: the number of steps; None if not known.
        verbose: "auto", 0 for nothing, 1, or 2 for one line at the end, as in `fit`.
    """

    def __init__(self, label, total, verbose):
        self._label, self._total = label, total
        if sys.stderr is None:  # a process without a console
            verbose = 0
        self._live = verbose in ("auto", 1) and sys.stderr.isatty()
        self._closing = self._live or verbose in (1, 2)
        self._begun = time.monotonic()
        self._drawn = 0.0

    def update(self, count):
        """Show that this many steps are done."""
        # A tenth of a second is as fast as anybody reads.
        if self._live and time.monotonic() - self._drawn > 0.1:
            self._drawn = time.monotonic()
            sys.stderr.write(f"\r{self._line(count)}")
            sys.stderr.flush()

    def close(self, count):
        """Show how many steps it was."""
        if self._closing and count:
            sys.stderr.write(f"{chr(13) * bool(self._drawn)}{self._line(count)}\n")
            sys.stderr.flush()

    def _line(self, count):
        seconds = time.monotonic() - self._begun
        if self._total is None:
            return f"{self._label} {count} {seconds:.0f}s"
        full = _WIDTH * count // max(self._total, 1)
        bar = "━" * full + " " * (_WIDTH - full)
        return f"{self._label} {count}/{self._total} {bar} {seconds:.0f}s"
