"""Layers in floats, those first that add most error, until a file is good enough."""

import functools
import math

import keras
import numpy as np

from keras_bn import verify
from keras_bn.int8.samples import batch_of, joined
from keras_bn.surgery.calls import as_declared

# Files that are made at most. Bisection then finds the fewest of 127 steps.
CONVERSIONS = 8
# For comparing how long two files take.
_SECONDS = 0.5


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


class Scored:
    """The metric of a model and of its files on labelled samples.

    Args:
        model: the model of floats.
        samples: list of batches, each a list of arrays, one for each input.
        labels: of all of them.
        names: `(inputs, outputs)`: the names in a file.
        metric: a function of labels and outputs, greater where better.
    """

    def __init__(self, model, samples, labels, names, metric):
        self._samples, self._names, self._metric = samples, names, metric
        leaves = keras.tree.flatten(labels)  # a dict may hold those of one output
        self._labels = leaves[0] if len(leaves) == 1 else labels
        x = as_declared(model, joined(samples))
        outputs = model.predict(x, batch_of(model), verbose=0)
        self.floats = self._of(keras.tree.flatten(outputs))

    def __call__(self, interpreter):
        """The metric of a file."""
        outputs = []
        for batch in self._samples:
            interpreter.run(dict(zip(self._names.inputs, batch, strict=True)))
            tensors = interpreter.outputs()
            outputs.append([interpreter.value(tensors[n]) for n in self._names.outputs])
        return self._of(joined(outputs))

    def slower(self, interpreter, other):
        """How long a file takes, over the time of another."""
        inputs = dict(zip(self._names.inputs, self._samples[0], strict=True))
        functions = {"one": interpreter, "other": other}
        times = verify.interleave(
            {n: functools.partial(i.run, inputs) for n, i in functions.items()},
            _SECONDS,
        )
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

    Args:
        first: `(report, content, interpreter)` of the file of integers.
        written: gives the same with layers in floats, from a set of their paths.
        score: a `Scored`.
        lose: how much lower than in floats the metric may be.

    Returns:
        `(report, content)`.

    Raises:
        ValueError: if no such file is found.
    """
    report, content, interpreter = first
    scores = [score(interpreter)]
    least = score.floats - lose
    added: dict[str, float] = {}
    for layer in report.layers:  # a shared one adds at each call
        added[layer.layer] = max(added.get(layer.layer, 0.0), layer.added)
    order = sorted(added, key=lambda path: -np.nan_to_num(added[path], nan=math.inf))
    most = 2 ** (CONVERSIONS - 1) - 1
    steps = sorted({math.ceil(len(order) * i / most) for i in range(1, most + 1)})
    low, high, best = 0, len(steps), None
    if scores[0] >= least:
        low, best = high, first
    while low < high:
        middle = (low + high) // 2
        found = written(set(order[: steps[middle]]))
        scores.append(score(found[2]))
        if scores[-1] >= least:
            best, high, reached = found, middle, scores[-1]
        else:
            low = middle + 1
    if best is None:
        raise ValueError(
            f"No file of '{report.model}' was found that loses at most {lose:g}: the "
            f"metric is {score.floats:.4g} in floats, {scores[0]:.4g} in int8, and "
            f"{max(scores):.4g} at best with layers in floats. Give more `data`, or "
            "train for int8: `keras_bn.quantize_aware`."
        )
    report, content, other = best
    report.scores = {"float": score.floats, "int8": scores[0], "file": scores[0]}
    report.conversions = len(scores)
    if best is not first:
        report.scores["file"] = reached
        report.raised = {path: added[path] for path in order[: steps[high]]}
        report.larger = len(content) / len(first[1])
        report.slower = score.slower(other, interpreter)
    return report, content
