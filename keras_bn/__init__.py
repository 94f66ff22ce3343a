"""Batch normalization for Keras 3."""

from keras_bn import quiet  # noqa: F401, I001  # before TensorFlow
from keras_bn import backend  # noqa: F401  # before all that imports Keras
from keras_bn import testing  # noqa: F401
from keras_bn.diagnosis.logger import StatisticsLogger
from keras_bn.diagnosis.diagnose import compare, diagnose, fix
from keras_bn.int8.aware import quantize_aware
from keras_bn.int8.export import export_int8
from keras_bn.layer import BatchNormalization
from keras_bn.moments import Moments
from keras_bn.layer.renorm import renorm_ramp
from keras_bn.tools.convert import from_keras, to_keras
from keras_bn.tools.fold import fold, plan_fold
from keras_bn.tools.freeze import freeze, unfreeze
from keras_bn.tools.freeze_after import FreezeAfter
from keras_bn.loading.load import load_model
from keras_bn.tools.pytorch import from_torch, to_torch
from keras_bn.tools.recalibrate import Recalibrate, recalibrate
from keras_bn.version import __version__

__all__ = [
    "BatchNormalization",
    "FreezeAfter",
    "Moments",
    "Recalibrate",
    "StatisticsLogger",
    "__version__",
    "compare",
    "diagnose",
    "export_int8",
    "fix",
    "fold",
    "freeze",
    "from_keras",
    "from_torch",
    "load_model",
    "plan_fold",
    "quantize_aware",
    "recalibrate",
    "renorm_ramp",
    "to_keras",
    "to_torch",
    "unfreeze",
]
