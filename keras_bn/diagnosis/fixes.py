"""Remedies that a function of keras_bn applies."""

from typing import NamedTuple


class Fix(NamedTuple):
    """A remedy that can be applied; its string is the code that does it.

    In the code, `x` stands for what `fit` takes as its `x`: inputs without their
    labels, or a data set, with labels or without.

    Args:
        tool: `"recalibrate"` or `"unfreeze"`.
        include_frozen: whether recalibration changes frozen layers, too.

    Example:

    >>> from keras_bn.diagnosis.fixes import Fix
    >>> print(Fix("recalibrate", include_frozen=True))
    keras_bn.recalibrate(model, x, include_frozen=True)
    """

    tool: str
    include_frozen: bool = False

    @property
    def statistics_only(self) -> bool:
        """Whether it changes moving statistics and nothing else."""
        return self.tool == "recalibrate"

    def __str__(self) -> str:
        if self.tool == "unfreeze":
            return "keras_bn.unfreeze(model)"
        frozen = ", include_frozen=True" if self.include_frozen else ""
        return f"keras_bn.recalibrate(model, x{frozen})"
