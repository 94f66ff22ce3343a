"""`keras-bn rule`: what a rule finds, and what helps."""

import textwrap

from keras_bn.cli.checks import rules
from keras_bn.diagnosis.rules import RULES


def run(arguments):
    kinds = rules(arguments.rules, "rules") or RULES.keys()
    texts = [
        f"{rule.id} {rule.kind}\n\n{textwrap.indent(rule.text, '    ')}"
        for rule in RULES.values()
        if rule.kind in kinds
    ]
    print("\n\n".join(texts))
    return 0
