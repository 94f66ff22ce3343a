"""A user's file with every public name of keras_bn, for type checkers."""

from pathlib import Path

import keras  # type: ignore[import-untyped]
import numpy as np
import torch
from typing_extensions import assert_type

import keras_bn
from keras_bn import testing


def functional() -> keras.Model:
    """A functional model."""
    inputs = keras.Input((4,))
    norm = keras_bn.BatchNormalization(
        axis=-1, momentum=0.9, renorm=False, freeze_statistics=False, name="bn"
    )
    norm.freeze_affine = True
    return keras.Model(inputs, norm(keras.layers.Dense(3)(inputs)))


def converted(model: keras.Model, sequential: keras.Sequential) -> None:
    """What takes a model and gives one of the same class."""
    assert_type(keras_bn.from_keras(sequential), keras.Sequential)
    assert_type(keras_bn.to_keras(sequential), keras.Sequential)
    assert_type(keras_bn.quantize_aware(sequential, np.zeros((2, 4))), keras.Sequential)
    assert_type(keras_bn.from_keras(model, in_place=True), keras.Model)
    assert_type(keras_bn.fold(model), keras.Model)
    assert_type(keras_bn.functional(model, keras.Input((4,))), keras.Model)
    assert_type(keras_bn.replace(sequential, "group"), keras.Sequential)
    keras_bn.replace(model, lambda norm: keras.layers.LayerNormalization())
    assert_type(keras_bn.load_model(Path("model.keras")), keras.Model)


def frozen(model: keras.Model, fuse: bool) -> None:
    """What freezes."""
    assert_type(keras_bn.freeze(model), list[str])
    assert_type(keras_bn.freeze(model, fuse=False, affine=True), list[str])
    for fold in keras_bn.freeze(model, fuse=True):
        assert_type(fold, keras_bn.Fold)
    keras_bn.freeze(model, fuse=fuse)
    assert_type(keras_bn.unfreeze(model), list[str])
    assert_type(keras_bn.adapt(model, prior=16.0), list[str])
    assert_type(keras_bn.unadapt(model), list[str])
    plan: keras_bn.Folds = keras_bn.plan_fold(model)
    into: list[str | None] = [fold.into for fold in plan]
    print(plan, into)


def diagnosed(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    """Reports and what is in them."""
    report: keras_bn.Report = keras_bn.diagnose(model, (x, y), ignore=["BN010"])
    findings: list[keras_bn.Finding] = report.at_least("warning")
    for finding in findings:
        fix: keras_bn.Fix | None = finding.fix
        print(finding.kind, finding.layer, finding.message, finding.remedy, fix)
    record: keras_bn.ModelRecord = report.record
    for layer in record.layers:
        if isinstance(layer, keras_bn.MeasuredLayer):
            drift: keras_bn.Drift = layer.drift
            print(drift.worst_mean, layer.data.variance, layer.gap)
    origin: keras_bn.Origin | None = report.origin
    one: keras_bn.LayerRecord = report.layer("bn")
    fixed: keras_bn.Fixed = report.fix()
    assert_type(keras_bn.fix(model, report, (x, y)), keras_bn.Fixed)
    comparison: keras_bn.Comparison = keras_bn.compare(report, fixed.after)
    print(one.moving_mean, origin, comparison.gone, fixed.recalibrated["bn"].mean)
    int8: keras_bn.Int8Report = keras_bn.export_int8(model, "model.tflite", x)
    layers: list[keras_bn.Int8Layer] = int8.layers
    report.write_html("report.html", int8)
    report.plot("report.png")
    print(
        report.to_dict(),
        report.to_dataframe(),
        int8.error,
        layers,
        report.to_html(int8=int8),
    )
    testing.assert_healthy(model, x)
    keras_bn.testing.assert_healthy(model, fail_on="error")


def statistics(model: keras.Model, x: np.ndarray) -> None:
    """Statistics as values, and callbacks."""
    moments: keras_bn.Statistics = keras_bn.recalibrate(model, x, verbose=0)
    day = keras_bn.statistics(model, x, batch_size=16, verbose=0)
    day.save("day.npz")
    whole = keras_bn.pooled([day, keras_bn.Statistics.load("day.npz").counted(10)])
    keras_bn.set_statistics(model, whole)
    with keras_bn.using(model, day) as same:
        assert_type(same, keras.Model)
    merged: keras_bn.Moments = moments["a"].merge(moments["b"]).unbiased()
    logger = keras_bn.StatisticsLogger(x, "drift.csv")
    rows: list[keras_bn.DriftRow] = logger.rows
    callbacks: list[keras.callbacks.Callback] = [
        logger,
        keras_bn.Recalibrate(x),
        keras_bn.FreezeAfter(100),
    ]
    ramp: dict[str, keras_bn.LinearRamp] = keras_bn.renorm_ramp(scale=0.5)
    layer = keras_bn.BatchNormalization(renorm=True, renorm_clipping=ramp)
    layer = keras_bn.from_torch(torch.nn.BatchNorm1d(3))
    print(merged.count, rows, callbacks, keras_bn.to_torch(layer))
    print(keras_bn.__version__.upper())
