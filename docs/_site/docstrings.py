"""Doctests in fences: the site's Markdown takes `>>>` for a quotation."""

import griffe


class Docstrings(griffe.Extension):
    """Fences every paragraph of a docstring that is a doctest."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(fenced, paragraphs))


def fenced(paragraph):
    indent, prompt, _ = paragraph.partition(">>>")
    if prompt and not indent.strip():
        return f"{indent}```pycon\n{paragraph}\n{indent}```"
    return paragraph
