"""`keras-bn rule`: what a rule finds, and what helps; and the rules of options."""

import textwrap

from keras_bn.cli.errors import UsageError
from keras_bn.diagnosis.rules import RULES, ignored_kinds


def run(arguments):
    kinds = rules(arguments.rules, "it") or RULES.keys()
    texts = [
        f"{rule.id} {rule.kind}\n\n{textwrap.indent(rule.text, '    ')}"
        for rule in RULES.values()
        if rule.kind in kinds
    ]
    print("\n\n".join(texts))
    return 0


def rules(values, option):
    """The kinds of findings that an option gives, as a set.

    Args:
        values: lists of names with commas, as they were given.
        option: its name, for the message.

    Raises:
        UsageError: for a name that is no rule.
    """
    names = [name.strip() for name in ",".join(values).split(",") if name.strip()]
    try:
        return ignored_kinds(names)
    except ValueError as error:
        reason = str(error).removeprefix("`ignore` ")
        raise UsageError(f"{option} {reason}") from error
