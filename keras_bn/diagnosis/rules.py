"""The kinds of findings, each with an id that never changes, and how to ignore some."""

import re
from functools import cache
from importlib.resources import files
from typing import NamedTuple

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")

# Of a report as a dict; it grows when a key goes away or changes its meaning.
SCHEMA_VERSION = 1


# In front of the text of a rule that only data can show.
_NEEDS_DATA = "● "


@cache
def _texts():
    """The texts of the rules by id, without their marks of Markdown."""
    page = files("keras_bn.diagnosis").joinpath("rules.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (BN\d+) .*\n\n", page, flags=re.M)[1:]
    links = re.compile(r"\[([^\]]*)\]\([^)]*\)")
    return {
        id: links.sub(r"\1", text.strip()).replace(_NEEDS_DATA, "Needs data. ")
        for id, text in zip(parts[::2], parts[1::2], strict=True)
    }


class Rule(NamedTuple):
    """One kind of finding.

    Args:
        id: such as `"BN005"`; a new rule gets the next number, and none is used again.
        kind: such as `"stale-statistics"`.
        says: what it finds, in a sentence.
        needs_data: whether it can only be found with data.
    """

    id: str
    kind: str
    says: str
    needs_data: bool = False

    @property
    def text(self):
        """What it finds, how severe that is, and what helps, as in `docs/faq.md`."""
        return _texts()[self.id]

    @property
    def anchor(self):
        """The heading of the rule in `docs/faq.md`, as a part of its address."""
        return f"{self.id.lower()}-{self.kind}"


_ALL = (
    Rule("BN001", "never-updated", "The moving statistics are the initial ones."),
    Rule("BN002", "non-finite-statistics", "Moving statistics are NaN or infinite."),
    Rule("BN003", "negative-variance", "A moving variance is negative."),
    Rule(
        "BN004",
        "momentum-too-slow",
        "The training was too short for the momentum.",
        needs_data=True,
    ),
    Rule(
        "BN005",
        "stale-statistics",
        "The moving statistics are not those of the data.",
        needs_data=True,
    ),
    Rule("BN006", "dead-channel", "Channels hardly vary."),
    Rule("BN007", "small-gamma", "Gamma is close to zero in some channels."),
    Rule("BN008", "frozen", "Training does not update the moving statistics."),
    Rule(
        "BN009",
        "small-batch",
        "The statistics of a batch rest on few elements.",
        needs_data=True,
    ),
    Rule("BN010", "redundant-bias", "A bias before the normalization has no effect."),
    Rule(
        "BN011",
        "train-inference-gap",
        "In inference the model computes something else than in training.",
        needs_data=True,
    ),
    Rule("BN012", "large-mean", "A mean is far larger than the standard deviation."),
    Rule(
        "BN013",
        "non-finite-data",
        "Samples in the data are NaN or infinite.",
        needs_data=True,
    ),
    Rule("BN014", "non-finite-parameters", "Gamma or beta is NaN or infinite."),
    Rule(
        "BN015",
        "follows-inputs",
        "Predictions depend on the other samples of their batch.",
    ),
)
# By kind, in the order of their ids.
RULES = {rule.kind: rule for rule in _ALL}


def ignored_kinds(ignore):
    """The kinds of findings that `ignore` names.

    Args:
        ignore: ids or kinds of rules, such as `["BN007", "frozen"]`, or one of them.

    Returns:
        A set of kinds.

    Raises:
        ValueError: for a name that is no rule.

    >>> sorted(ignored_kinds(["BN007", "frozen"]))
    ['frozen', 'small-gamma']
    """
    names = [ignore] if isinstance(ignore, str) else list(ignore)
    by_name = {name: rule.kind for rule in _ALL for name in (rule.id, rule.kind)}
    for name in names:
        if name not in by_name:
            raise ValueError(
                f"`ignore` takes rules: {_ALL[0].id} to {_ALL[-1].id}, or kinds such "
                f"as 'small-gamma'. Received: {name!r}"
            )
    return {by_name[name] for name in names}
