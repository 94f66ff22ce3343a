"""How a file of integers is made: the options, and which do not go together."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


def accuracy(labels, outputs):
    """The share of samples whose largest output is that of the label.

    Args:
        labels: array of whole numbers, or of ones and zeros for each class.
        outputs: array with a value for each class along its last axis.
    """
    several = isinstance(outputs, list) or outputs.shape[-1] < 2
    labels = None if several else np.asarray(labels)
    if not several and labels.shape == outputs.shape:
        labels = labels.argmax(-1)
    if several or labels.size != math.prod(outputs.shape[:-1]):
        raise ValueError(
            "The accuracy needs a model with one output, a value for each class, and a "
            "label for each of its samples. Give another `metric`: a function of "
            "labels and outputs, greater where better."
        )
    return float(np.mean(outputs.argmax(-1) == labels.reshape(outputs.shape[:-1])))


class Options(NamedTuple):
    """The options of `export_int8`, and the suffix of the path of its file."""

    equalize: bool = False
    correct_bias: bool = True
    activations: int = 8
    keep_float: Sequence[str] = ()
    lose: float | None = None
    metric: Callable[..., float] = accuracy
    symmetric: bool = False
    suffix: str = ".tflite"

    @property
    def to_onnx(self) -> bool:
        """Whether the file is one of ONNX."""
        return self.suffix.lower() == ".onnx"

    def check(self) -> None:
        """Refuse options that are invalid, or that do not go together."""
        bits, lose, metric = self.activations, self.lose, self.metric
        number = isinstance(lose, numbers.Real) and 0 <= float(lose) < math.inf
        for right, name, rule in (
            (bits in (8, 16), "activations", "`activations` must be 8 or 16"),
            (lose is None or number, "lose", "`lose` must be a number, 0 or greater"),
            (lose is None or bits == 8, "activations", "`lose` is for 8 bits only"),
            (callable(metric), "metric", "`metric` must be a function"),
            (lose is not None or metric is accuracy, "lose", "`metric` is for `lose`"),
            (
                bits == 8 or not self.to_onnx,
                "activations",
                "`activations` must be 8 for an `.onnx` file: onnxruntime has no "
                "convolution with others",
            ),
        ):
            if not right:
                raise ValueError(f"{rule}. Received: {name}={getattr(self, name)!r}")
        if self.symmetric and not self.to_onnx:
            raise ValueError(
                "`symmetric` is for an `.onnx` file. Received: symmetric=True and a "
                f"path that ends in {self.suffix!r}"
            )
