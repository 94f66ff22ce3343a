"""Diagnosing a model, comparing two diagnoses, mending what statistics can mend."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_bn.diagnosis.collect import Collector, read
from keras_bn.diagnosis.findings import findings
from keras_bn.diagnosis.records import Source
from keras_bn.diagnosis.report import Comparison, Fixed, Report
from keras_bn.diagnosis.rules import ERROR, WARNING, ignored_kinds
from keras_bn.pages.origin import origin_of
from keras_bn.passes.data import Verbose, check_end
from keras_bn.surgery.arrays import rolled_back
from keras_bn.surgery.norms import normalizations, warn_of_others
from keras_bn.surgery.private import require
from keras_bn.tools.recalibrate import replace_statistics


def diagnose(
    model: keras.Model,
    data: Any = None,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    ignore: Sequence[str] = (),
    verbose: Verbose = "auto",
) -> Report:
    """Say what is wrong with the batch normalizations of a model, and how to fix it.

    If a model trains well and evaluates badly, its moving statistics are usually not
    those of its data. This runs the data through the model twice, with the moving
    statistics and with the statistics of each batch, everything else in inference, and
    compares. The model does not change.

    Without data, it finds what the model itself shows: lost, negative or initial
    statistics, dead channels, large means, small gammas, frozen layers, idle biases.
    The report says which findings were not looked for.

    Args:
        model: a built model, with `keras_bn` or Keras layers.
        data: inputs as in training, as `fit` takes them: arrays, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator with `steps`. With labels, as a
            tuple `(x, y)` or in the data set, this also compares the loss of `evaluate`
            and the accuracy; `(x, y, sample_weight)` weights the samples in the loss.
        steps: how many batches to take; all of them by default.
        batch_size: for arrays; 32 by default. Use that of training, and a random
            order.
        ignore: findings to leave out, by id or kind: `["BN007", "frozen"]`.
        verbose: `"auto"`, 0, 1 or 2, as in `fit`; `fix` keeps to it.

    Returns:
        A `Report`: `print(report)` shows it, a notebook displays it, `report.open()`
        opens it in a browser; `report.findings` lists what was found, `report.fix()`
        applies the remedies that change statistics only.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: for a model that is not built or has no batch normalization, for
            no data, endless data without `steps`, and an unknown rule in `ignore`.

    Warns:
        UserWarning: for layers that it skips because their class has its own `call`.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), keras_bn.BatchNormalization(name="bn")], name="model"
    ... )
    >>> x = np.random.default_rng(0).normal(5.0, 1.0, (200, 2))
    >>> for finding in keras_bn.diagnose(model, x).findings:
    ...     print(finding.kind, finding.layer, finding.remedy)
    never-updated bn keras_bn.recalibrate(model, x)
    train-inference-gap model keras_bn.recalibrate(model, x)
    >>> _ = keras_bn.recalibrate(model, x, verbose=0)
    >>> keras_bn.diagnose(model, x).findings
    []
    """
    require("keras_bn.diagnose", "layers", "graph", "copy", "data")
    kinds = ignored_kinds(ignore)
    if data is None:
        if steps is not None or batch_size is not None:
            raise ValueError(
                "`steps` and `batch_size` are about `data`, and there is none. "
                f"Received: steps={steps} and batch_size={batch_size}"
            )
        record = read(model)
    else:
        options = {"steps": steps, "batch_size": batch_size, "verbose": verbose}
        record = Collector(model).collect(data, **options)
    warn_of_others(model)
    every = findings(record)
    return Report(
        record,
        [f for f in every if f.kind not in kinds],
        [f for f in every if f.kind in kinds],
        origin_of(data),
        Source(model, data, steps, batch_size, tuple(kinds), verbose),
    )


def compare(before: Report, after: Report) -> Comparison:
    """Two reports side by side: what went, what came, and the drift of both.

    Args:
        before, after: reports of `keras_bn.diagnose`, of one model at two times or of
            two models with layers of the same paths.

    Returns:
        A `Comparison`: `print` shows it, a notebook displays it, `open()` opens it in a
        browser.

    Raises:
        TypeError: if one is no report.
        ValueError: if they have no layer in common.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), keras_bn.BatchNormalization(name="bn")], name="model"
    ... )
    >>> x = np.random.default_rng(0).normal(5.0, 1.0, (200, 2))
    >>> before = keras_bn.diagnose(model, x)
    >>> _ = keras_bn.recalibrate(model, x, verbose=0)
    >>> comparison = keras_bn.compare(before, keras_bn.diagnose(model, x))
    >>> [finding.kind for finding in comparison.gone]
    ['never-updated', 'train-inference-gap']
    """
    for name, report in (("before", before), ("after", after)):
        if not isinstance(report, Report):
            raise TypeError(
                f"`{name}` must be a report of keras_bn.diagnose. Received: {report!r}"
            )
    comparison = Comparison(before, after)
    if not any(None not in pair for _, *pair in comparison.layers):
        raise ValueError(
            "The reports have no layer in common. Received: "
            f"{_paths(before)} and {_paths(after)}"
        )
    return comparison


def fix(
    model: keras.Model,
    report: Report,
    data: Any = None,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
) -> Fixed:
    """Apply the remedies of a report that change statistics only; diagnose again.

    If an error or a warning has such a remedy, this recalibrates the layers that are
    not frozen, and those frozen ones whose statistics are an error. No weight changes.
    If anything fails, the model does not change.

    Args:
        model: the model of the report, which changes.
        report: what `keras_bn.diagnose` has found.
        data: as in `keras_bn.diagnose`; by default what was diagnosed. Other data is
            diagnosed first.
        steps, batch_size: for `data`, as in `keras_bn.diagnose`.

    Returns:
        A `Fixed`: the reports before and after, and what was done.

    Raises:
        ValueError: if there is no data, or a generator without `steps`.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> norm = keras_bn.BatchNormalization(name="bn")
    >>> model = keras.Sequential([keras.Input((2,)), norm])
    >>> x = np.random.default_rng(0).normal(5.0, 1.0, (200, 2))
    >>> report = keras_bn.diagnose(model, x)
    >>> keras_bn.fix(model, report, x).after.findings
    []
    """
    require("keras_bn.fix", "layers", "graph", "copy", "data")
    source = report.source
    ignore, verbose = (source.ignore, source.verbose) if source else ((), "auto")
    if data is not None:
        check_end(data, steps)
        report = diagnose(
            model,
            data,
            steps=steps,
            batch_size=batch_size,
            ignore=ignore,
            verbose=verbose,
        )
    elif source is None or source.data is None:
        raise ValueError(
            "Recalibration needs data, and this report is without: report.fix(data)"
        )
    else:
        data, steps, batch_size = source.data, source.steps, source.batch_size
        check_end(data, steps)
    paths = _to_recalibrate(report)
    if not paths:
        return Fixed(report, report, {})
    present = normalizations(model)
    layers = {path: present[path] for path in paths}
    variables = [
        variable
        for layer in layers.values()
        for variable in layer.non_trainable_variables
    ]
    x = data[0] if isinstance(data, tuple) else data
    options: Any = {"steps": steps, "batch_size": batch_size, "verbose": verbose}
    with rolled_back(variables):
        moments = replace_statistics(model, layers, x, **options)
        after = diagnose(model, data, ignore=ignore, **options)
    if report.origin and after.origin:
        after.origin = after.origin._replace(
            file=report.origin.file, data=report.origin.data
        )
    return Fixed(report, after, moments)


def _to_recalibrate(report):
    """The paths of the layers whose statistics `fix` replaces."""
    fixable = [
        finding
        for finding in report.at_least(WARNING)
        if finding.fix and finding.fix.statistics_only
    ]
    if not fixable:
        return []
    lost = {finding.layer for finding in fixable if finding.severity == ERROR}
    return [
        layer.layer
        for layer in report.record.layers
        if not layer.frozen or layer.layer in lost
    ]


def _paths(report):
    return ", ".join(layer.layer for layer in report.record.layers)
