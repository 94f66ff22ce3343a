"""How far a file of integers is from the model of floats, layer by layer."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from keras_bn.pages import plain
from keras_bn.pages.display import Content, Section
from keras_bn.pages.origin import Origin
from keras_bn.pages.plain import escaped, number

# The error that fills the bar of a layer: what the command allows for an output. The
# noise has a hundredth of the power of the signal, 20 dB below it.
FULL_ERROR = 0.1
# Here the noise has a tenth of the power, 10 dB below.
LARGE_ERROR = 10**-0.5
_VERDICTS = {
    "healthy": "close to float",
    "warning": "some way from float",
    "error": "far from float",
}


class Int8Layer(NamedTuple):
    """The error of one layer.

    Args:
        layer: the path of the layer; of one with weights, if the file computes several
            layers in one operation.
        output: the path of the last of these, whose output is compared.
        operation: the operation of the file, as `"CONV_2D"`.
        error: the root mean square of int8 less float over all samples, channels and
            positions, divided by the standard deviation of float over the same.
        added: the part of it that its inputs did not have.
    """

    layer: str
    output: str
    operation: str
    error: float
    added: float = 0.0


@dataclass(repr=False)
class Int8Report(Section):
    """What `keras_bn.export_int8` wrote, and how far it is from the model of floats.

    Args:
        model: the name of the model.
        size: bytes of the file.
        samples: how many samples were compared.
        drawn: whether they were drawn at random, since no data was given.
        outputs: the error of each output of the model, by its name: root mean square
            over standard deviation, against the model that was given.
        layers: a list of `Int8Layer`, the worst first. An error contains those of the
            layers before it.
        equalized: the pairs of layers whose channels were equalized, as paths.
        corrected: the paths of the layers whose bias was corrected.
        kept: batch normalizations that could not be folded, with the reason, by path.
        floats: the paths of the layers that compute in floats.
        scores: with `lose`, the metric in floats, of the file of integers alone, and of
            this file: `"float"`, `"int8"` and `"file"`.
        raised: the layers that `lose` keeps in floats, with the error that they add in
            the file of integers alone, by path.
        conversions: how many conversions it took, repeated ones too.
        larger, slower: the size of this file, and its time in TFLite's own kernels
            or in onnxruntime, over those of the file of integers alone.
        origin: an `Origin`: on what it was made, when, and with which versions.
    """

    model: str
    size: int
    samples: int
    drawn: bool
    outputs: dict[str, float]
    layers: list[Int8Layer]
    equalized: list[tuple[str, str]] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    floats: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    raised: dict[str, float] = field(default_factory=dict)
    conversions: int = 1
    larger: float = 1.0
    slower: float = 1.0
    origin: Origin | None = field(default=None, compare=False)

    @property
    def error(self) -> float:
        """The largest error of an output."""
        return max(self.outputs.values(), key=lambda e: math.inf if e != e else e)

    def _in_a_line(self):
        return f"{escaped(self.model)}: {self._verdict()}"

    def __str__(self) -> str:
        lines = [f"{escaped(self.model)}: {self._about()}", *self.said()]
        table = plain.lines(plain.table(HEADER, self.rows()))
        return "\n".join([*lines, "", *table])

    def _about(self):
        drawn = " drawn at random" if self.drawn else ""
        integer = "in part in floats" if self.floats else "all integer"
        return (
            f"{self.size:,} bytes, {integer}; compared with float on "
            f"{self.samples} samples{drawn}"
        )

    def said(self) -> list[str]:
        """The errors of the outputs, and what was done on the way: lines of text."""
        lines = [f"output {escaped(n)}: error {e:.2%}" for n, e in self.outputs.items()]
        if self.equalized:
            lines.append(f"pairs of layers equalized: {len(self.equalized)}")
        if self.corrected:
            lines.append(f"biases corrected: {len(self.corrected)}")
        if self.floats:
            lines.append(f"in floats: {', '.join(map(escaped, self.floats))}")
        if self.scores:
            of = self.scores
            lines.append(
                f"metric: {of['float']:.4g} in floats, {of['int8']:.4g} in integers "
                f"alone, {of['file']:.4g} in this file, found in {self.conversions} "
                "conversions"
            )
        if self.raised:
            layers = [f"{escaped(n)} adds {e:.2%}" for n, e in self.raised.items()]
            lines.append(
                f"kept in floats for it: {', '.join(layers)}; the file is "
                f"{self.larger:.2f} times as large, and takes {self.slower:.2f} times "
                "as long"
            )
        if self.kept:
            many = len(self.kept)
            lines.append(f"normalizations not folded: {many} (plan_fold says why)")
        return lines

    def rows(self) -> list[list[str]]:
        """The layers as rows of strings, under `HEADER`."""
        return [
            [
                layer.layer,
                "" if layer.output == layer.layer else layer.output,
                layer.operation,
                f"{layer.error:.2%}",
                f"{layer.added:.2%}",
            ]
            for layer in self.layers
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types, ready for JSON; NaN and infinity become None."""
        names = [each.name for each in fields(self) if each.name != "origin"]
        own = plain.json({name: getattr(self, name) for name in names})
        return {"bytes": own.pop("size"), "error": number(self.error), **own}

    def section(self) -> Content:
        context = {
            "about": self._about(),
            "said": self.said(),
            "layers": [(layer, _tone(layer.error)) for layer in self.layers],
            "full_error": FULL_ERROR,
        }
        return Content(f"{self.model} in int8", "int8_section.html", context)

    def _content(self):
        section = self.section()
        context = {
            "report": self,
            "tone": _tone(self.error),
            "verdict": self._verdict(),
            "tiles": self._tiles(),
            "origin": self.origin.lines() if self.origin else [],
        }
        return Content(section.title, "int8.html", {**section.context, **context})

    def _verdict(self):
        return f"{_VERDICTS[_tone(self.error)]}: off by {self.error:.2%}"

    def _tiles(self):
        outputs = [(name, f"{error:.2%}") for name, error in self.outputs.items()]
        counts = [
            ("pairs equalized", f"{len(self.equalized):,}"),
            ("biases corrected", f"{len(self.corrected):,}"),
            ("normalizations not folded", f"{len(self.kept):,}"),
        ]
        size = [("bytes", f"{self.size:,}"), ("samples compared", f"{self.samples:,}")]
        return [("Error of the outputs", outputs), ("File", size), ("Done", counts)]


def _tone(error):
    """How severe an error is; NaN is an error."""
    if error <= FULL_ERROR:
        return "healthy"
    return "warning" if error <= LARGE_ERROR else "error"


HEADER = ["layer", "with", "operation", "error", "added"]
