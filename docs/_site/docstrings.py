"""Docstrings, written for `help`, doctest and Keras, as Markdown for the site."""

import re
import textwrap

import griffe

DOCTEST = re.compile(r"^(?P<indent> *)>>> .*\n?(?:.*\S.*\n?)*", re.M)
CALL = re.compile(r"^Call arguments:\n(?P<items>(?:    .*\n)+)", re.M)

RETURNS = re.compile(r"^Returns:\n(?P<text>(?:    .*\n?)+)", re.M)


def fenced(match):
    """A doctest in a fence of its own."""
    indent = match["indent"]
    return f"{indent}```pycon\n{match[0].rstrip()}\n{indent}```\n"


def listed(match):
    """The arguments of `call`, a section that only Keras has, as a list."""
    items = textwrap.dedent(match["items"])
    items = re.sub(r"^(\w+): ", r"- `\1`: ", items, flags=re.M)
    return f"**Call arguments:**\n\n{items}"


def told(match):
    """What a function returns, as a paragraph: it has neither name nor type here."""
    return f"**Returns:**\n\n{textwrap.dedent(match['text'])}"


def markdown(text):
    """The text of a docstring as the site takes it."""
    for pattern, made in ((DOCTEST, fenced), (CALL, listed), (RETURNS, told)):
        text = pattern.sub(made, text)
    return text


class Docstrings(griffe.Extension):
    """Prepares every docstring."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
