"""Layers in floats, those first that add most error, until a file is good enough."""

import math

import keras
import numpy as np

from keras_bn import verify
from keras_bn.int8.samples import batch_of, joined
from keras_bn.surgery.calls import as_declared

# At most. If each gives a file, bisection finds the fewest of 127 steps.
CONVERSIONS = 8
# For comparing how long two files take.
_SECONDS = 0.5


class Scored:
    """The metric of a model of floats and of its files on labelled samples."""

    def __init__(self, model, samples, labels, metric):
        self._samples, self._metric = samples, metric
        leaves = keras.tree.flatten(labels)  # a dict may hold those of one output
        self._labels = leaves[0] if len(leaves) == 1 else labels
        x = as_declared(model, joined(samples))
        outputs = model.predict(x, batch_of(model), verbose=0)
        self.floats = self._of(keras.tree.flatten(outputs))

    def __call__(self, file):
        """The metric of a `File`."""
        return self._of(joined(map(file, self._samples)))

    def slower(self, file, other):
        """How long a file takes, over the time of another."""
        first = self._samples[0]
        runs = {"one": lambda: file.run(first), "other": lambda: other.run(first)}
        times = verify.interleave(runs, _SECONDS)
        return times["one"].median / times["other"].median

    def _of(self, outputs):
        outputs = outputs[0] if len(outputs) == 1 else outputs
        value = self._metric(self._labels, outputs)
        if np.size(value) != 1 or isinstance(value, str):
            raise ValueError(
                "`metric` must return a number. Received: a "
                f"{type(value).__name__} of shape {np.shape(value)}"
            )
        return float(np.reshape(value, ()))


def raised(first, written, score, lose):
    """The file with the fewest layers in floats that is found to be good enough.

    `first` is the report and the file without further layers in floats; `written` gives
    the same with those of a set of paths, `score` is a `Scored`.
    """
    report, file = first
    scores, least = [score(file)], score.floats - lose
    added: dict[str, float] = {}
    for layer in report.layers:  # a shared one adds at each call
        added[layer.layer] = max(added.get(layer.layer, 0.0), layer.added)
    order = sorted(added, key=lambda path: -np.nan_to_num(added[path], nan=math.inf))
    most = 2 ** (CONVERSIONS - report.conversions) - 1
    steps = sorted({math.ceil(len(order) * i / most) for i in range(1, most + 1)})
    best: tuple | None = None
    low, high = 0, len(steps)
    if scores[0] >= least:
        best, high = (*first, scores[0], []), 0
    conversions = report.conversions
    while low < high and conversions < CONVERSIONS:
        middle = (low + high) // 2
        layers = order[: steps[middle]]
        report, file = written(set(layers))
        conversions = report.conversions
        scores.append(score(file))
        if scores[-1] >= least:
            best, high = (report, file, scores[-1], layers), middle
        else:
            low = middle + 1
    if best is None:
        raise ValueError(
            f"No file of '{report.model}' was found that loses at most {lose:g}: the "
            f"metric is {score.floats:.4g} in floats, {scores[0]:.4g} in int8, and "
            f"{max(scores):.4g} at best with layers in floats. Give more `data`, or "
            "train for int8: `keras_bn.quantize_aware`."
        )
    report, file, reached, layers = best
    report.scores = {"float": score.floats, "int8": scores[0], "file": reached}
    report.conversions = conversions
    if layers:
        report.raised = {path: added[path] for path in layers}
        report.larger = report.size / first[0].size
        report.slower = score.slower(file, first[1])
    return report, file
