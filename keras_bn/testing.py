"""Assertions for tests of models."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_bn.diagnosis.diagnose import diagnose
from keras_bn.diagnosis.rules import SEVERITIES, WARNING


def assert_healthy(
    model: keras.Model,
    data: Any = None,
    *,
    ignore: Sequence[str] = (),
    fail_on: str = WARNING,
    steps: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Fail a test if the batch normalizations of a model are not healthy.

    Args:
        model, data, ignore, steps, batch_size: as in `keras_bn.diagnose`.
        fail_on: the least severity that fails: `"error"`, `"warning"` or `"note"`.

    Raises:
        AssertionError: with the report, if something is as severe as that.
        ValueError: for another `fail_on`, and as `keras_bn.diagnose`.

    Example:

    >>> import keras, keras_bn
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), keras_bn.BatchNormalization(name="bn")]
    ... )
    >>> keras_bn.testing.assert_healthy(model, ignore=["never-updated"])
    """
    __tracebackhide__ = True  # pytest points at the line that calls this.
    if fail_on not in SEVERITIES:
        raise ValueError(
            f"`fail_on` must be one of {', '.join(SEVERITIES)}. Received: {fail_on!r}"
        )
    report = diagnose(
        model, data, ignore=ignore, steps=steps, batch_size=batch_size, verbose=0
    )
    if found := report.at_least(fail_on):
        findings = "findings" if len(found) > 1 else "finding"
        raise AssertionError(
            f"{len(found)} {findings}, {fail_on} or worse:\n\n{report}"
        )
