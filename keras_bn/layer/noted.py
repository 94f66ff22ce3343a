"""How a frozen normalization and the linear layer before it are computed as one.

A frozen batch normalization is a scale and an offset per channel. They can go into the
kernel and the bias of the linear layer before it, which is cheaper. So that layer
leaves a note on its output: how to compute the output again, scaled and shifted, from
its own input. The normalization follows the note. Nothing then uses the output that
came with the note, and what is compiled does not compute it.

Each layer still gives its own output to whoever asks for that.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

from keras_bn.moments import Tensor

_NAME = "_keras_bn_note"
# Notes by the `id` of their tensors: those of JAX have no place for one.
_NOTES: dict = {}


class Note(NamedTuple):
    """How a tensor can be computed again with a scale and an offset.

    Args:
        axes: the channel axes of the tensor, not negative and ascending.
        again: `again(scale, offset)` gives `tensor * scale + offset`, with one value
            per channel each.
    """

    axes: tuple[int, ...]
    again: Callable[[Tensor, Tensor], Tensor]


def leave(tensor, note: Note):
    """Leave a note on a tensor."""
    try:
        setattr(tensor, _NAME, note)
    except AttributeError:
        _NOTES[id(tensor)] = note
        weakref.finalize(tensor, _NOTES.pop, id(tensor), None)


def of(tensor, axes) -> Note | None:
    """The note on a tensor; None if there is none, or its channels are elsewhere."""
    note = getattr(tensor, _NAME, None) or _NOTES.get(id(tensor))
    return note if note is not None and note.axes == tuple(axes) else None


def follow(note: Note, scale: Tensor, offset: Tensor) -> Tensor:
    """The tensor of a note, scaled and shifted; it has a note of its own."""

    def again(next_scale, next_offset):
        return note.again(scale * next_scale, offset * next_scale + next_offset)

    y = note.again(scale, offset)
    leave(y, Note(note.axes, again))
    return y
