"""Batch normalization for Keras 3.

Importing the package is cheap: a public name imports its module, and Keras, when it is
first used. Keras finds the layer in files as soon as both packages are imported, in
whatever order.
"""

from typing import TYPE_CHECKING

from keras_bn.importing import register_with_keras
from keras_bn.version import __version__

if TYPE_CHECKING:
    from keras_bn import testing as testing
    from keras_bn.diagnosis.diagnose import compare, diagnose, fix
    from keras_bn.diagnosis.findings import Finding
    from keras_bn.diagnosis.fixes import Fix
    from keras_bn.diagnosis.logger import DriftRow, StatisticsLogger
    from keras_bn.diagnosis.records import (
        Drift,
        LayerRecord,
        MeasuredLayer,
        ModelRecord,
    )
    from keras_bn.diagnosis.report import Comparison, Fixed, Report
    from keras_bn.int8.aware import quantize_aware
    from keras_bn.int8.export import export_int8
    from keras_bn.int8.report import Int8Layer, Int8Report
    from keras_bn.layer import BatchNormalization
    from keras_bn.layer.renorm import LinearRamp, renorm_ramp
    from keras_bn.loading.load import load_model
    from keras_bn.moments import Moments
    from keras_bn.pages.origin import Origin
    from keras_bn.passes.statistics import Statistics, pooled
    from keras_bn.tools.adapt import adapt, unadapt
    from keras_bn.tools.convert import from_keras, to_keras
    from keras_bn.tools.fold import Fold, Folds, fold, plan_fold
    from keras_bn.tools.freeze import freeze, unfreeze
    from keras_bn.tools.freeze_after import FreezeAfter
    from keras_bn.tools.functional import functional
    from keras_bn.tools.pytorch import from_torch, to_torch
    from keras_bn.tools.recalibrate import Recalibrate, recalibrate
    from keras_bn.tools.replace import replace
    from keras_bn.tools.statistics import set_statistics, statistics, using

__all__ = [
    "BatchNormalization",
    "Comparison",
    "Drift",
    "DriftRow",
    "Finding",
    "Fix",
    "Fixed",
    "Fold",
    "Folds",
    "FreezeAfter",
    "Int8Layer",
    "Int8Report",
    "LayerRecord",
    "LinearRamp",
    "MeasuredLayer",
    "ModelRecord",
    "Moments",
    "Origin",
    "Recalibrate",
    "Report",
    "Statistics",
    "StatisticsLogger",
    "__version__",
    "adapt",
    "compare",
    "diagnose",
    "export_int8",
    "fix",
    "fold",
    "freeze",
    "from_keras",
    "from_torch",
    "functional",
    "load_model",
    "plan_fold",
    "pooled",
    "quantize_aware",
    "recalibrate",
    "renorm_ramp",
    "replace",
    "set_statistics",
    "statistics",
    "to_keras",
    "to_torch",
    "unadapt",
    "unfreeze",
    "using",
]

# The module of each name, as the imports above say for type checkers.
_MODULES = {
    "BatchNormalization": "layer",
    "Comparison": "diagnosis.report",
    "Drift": "diagnosis.records",
    "DriftRow": "diagnosis.logger",
    "Finding": "diagnosis.findings",
    "Fix": "diagnosis.fixes",
    "Fixed": "diagnosis.report",
    "Fold": "tools.fold",
    "Folds": "tools.fold",
    "FreezeAfter": "tools.freeze_after",
    "Int8Layer": "int8.report",
    "Int8Report": "int8.report",
    "LayerRecord": "diagnosis.records",
    "LinearRamp": "layer.renorm",
    "MeasuredLayer": "diagnosis.records",
    "ModelRecord": "diagnosis.records",
    "Moments": "moments",
    "Origin": "pages.origin",
    "Recalibrate": "tools.recalibrate",
    "Report": "diagnosis.report",
    "Statistics": "passes.statistics",
    "StatisticsLogger": "diagnosis.logger",
    "adapt": "tools.adapt",
    "compare": "diagnosis.diagnose",
    "diagnose": "diagnosis.diagnose",
    "export_int8": "int8.export",
    "fix": "diagnosis.diagnose",
    "fold": "tools.fold",
    "freeze": "tools.freeze",
    "from_keras": "tools.convert",
    "from_torch": "tools.pytorch",
    "functional": "tools.functional",
    "load_model": "loading.load",
    "plan_fold": "tools.fold",
    "pooled": "passes.statistics",
    "quantize_aware": "int8.aware",
    "recalibrate": "tools.recalibrate",
    "renorm_ramp": "layer.renorm",
    "replace": "tools.replace",
    "set_statistics": "tools.statistics",
    "statistics": "tools.statistics",
    "testing": "testing",
    "to_keras": "tools.convert",
    "to_torch": "tools.pytorch",
    "unadapt": "tools.adapt",
    "unfreeze": "tools.freeze",
    "using": "tools.statistics",
}

register_with_keras()

if not TYPE_CHECKING:  # or type checkers would take any name for one that exists

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        from keras_bn.importing import import_keras

        import_keras()
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        value = module if name == "testing" else getattr(module, name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted([*__all__, "testing"])
