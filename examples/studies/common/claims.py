"""What a claim rests on: figures of several seeds, each part judged by the same rule.

A claim is made of parts. A part is one number per seed and the bound that the claim
sets it. The claim holds if every part holds, and a part holds if the numbers of at
least three seeds in four are beyond its bound: then the median is, and one odd seed
decides nothing. A number that is not finite speaks against the claim.
"""

import dataclasses
import math

import numpy as np

AGREEING = 0.75


@dataclasses.dataclass
class Part:
    """One part of a claim.

    Give one of `above` and `below`, from the claim itself, before looking at results:
    1 for a ratio, 0 for a difference, more where the claim promises more.

    Attributes:
        says: what is measured, such as "accuracy with BN, less that without".
        values: list of floats, one per seed. Compare within a seed, not across.
        above: what the values must be greater than.
        below: what the values must be less than.
        form: how a value is printed.
    """

    says: str
    values: list
    above: float | None = None
    below: float | None = None
    form: str = "{:.2f}"

    def __post_init__(self):
        if (self.above is None) == (self.below is None):
            raise ValueError(f"'{self.says}' needs one of above and below")
        if not len(self.values):
            raise ValueError(f"'{self.says}' has no values")
        self.values = [float(value) for value in self.values]

    @property
    def median(self):
        return float(np.median(self.values))

    @property
    def agreeing(self):
        """How many values are beyond the bound."""
        return sum(
            math.isfinite(value) and self._beyond(value) for value in self.values
        )

    @property
    def held(self):
        return self.agreeing >= AGREEING * len(self.values)

    @property
    def bound(self):
        if self.above is not None:
            return f"above {self.form.format(self.above)}"
        return f"below {self.form.format(self.below)}"

    def _beyond(self, value):
        return value > self.above if self.above is not None else value < self.below


def held(parts):
    """Whether a claim of these parts holds."""
    return all(part.held for part in parts)
