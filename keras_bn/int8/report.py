"""How far a file of integers is from the model of floats, layer by layer."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from keras_bn.tools.plain import number, table


class Int8Layer(NamedTuple):
    """The error of one layer.

    Args:
        layer: the path of the layer; of one with weights, if the file computes several
            layers in one operation.
        output: the path of the last of these, whose output is compared.
        operation: the operation of the file, as `"CONV_2D"`.
        error: the root mean square of int8 less float over all samples, channels and
            positions, divided by the standard deviation of float over the same.
    """

    layer: str
    output: str
    operation: str
    error: float


@dataclass
class Int8Report:
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
    """

    model: str
    size: int
    samples: int
    drawn: bool
    outputs: dict[str, float]
    layers: list[Int8Layer]
    equalized: list[tuple[str, str]]
    corrected: list[str]
    kept: dict[str, str]

    @property
    def error(self):
        """The largest error of an output."""
        return max(self.outputs.values(), key=lambda e: math.inf if e != e else e)

    def __str__(self):
        drawn = " drawn at random" if self.drawn else ""
        lines = [
            f"{self.model}: {self.size:,} bytes, all integer; compared with float on "
            f"{self.samples} samples{drawn}"
        ]
        lines += [f"output {n}: error {e:.2%}" for n, e in self.outputs.items()]
        if self.equalized:
            lines.append(f"{len(self.equalized)} pairs of layers equalized")
        if self.corrected:
            lines.append(f"{len(self.corrected)} biases corrected")
        if self.kept:
            lines.append(f"{len(self.kept)} batch normalizations not folded: plan_fold")
        return "\n".join([*lines, "", *table([HEADER], self.rows(), left=3)])

    def rows(self):
        """The layers as rows of strings, under `HEADER`."""
        return [
            [
                each.layer,
                "" if each.output == each.layer else each.output,
                each.operation,
                f"{each.error:.2%}",
            ]
            for each in self.layers
        ]

    def to_dict(self):
        """The report in plain types, ready for JSON; NaN and infinity become None."""
        return {
            "model": self.model,
            "bytes": self.size,
            "samples": self.samples,
            "drawn": self.drawn,
            "error": number(self.error),
            "outputs": {name: number(error) for name, error in self.outputs.items()},
            "layers": [
                {**each._asdict(), "error": number(each.error)} for each in self.layers
            ],
            "equalized": [list(pair) for pair in self.equalized],
            "corrected": list(self.corrected),
            "kept": dict(self.kept),
        }


HEADER = ["layer", "with", "operation", "error"]
