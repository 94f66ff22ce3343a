"""Batch normalization for Keras 3 on TensorFlow."""

from keras_bn import quiet, testing  # noqa: F401  # quiet before TensorFlow
from keras_bn.diagnosis.comparison import compare
from keras_bn.diagnosis.logger import StatisticsLogger
from keras_bn.diagnosis.report import diagnose
from keras_bn.layer import BatchNormalization
from keras_bn.moments import Moments
from keras_bn.renorm import renorm_ramp
from keras_bn.tools.convert import from_keras, to_keras
from keras_bn.tools.fold import fold, plan_fold
from keras_bn.tools.freeze import freeze, unfreeze
from keras_bn.tools.load import load_model
from keras_bn.tools.pytorch import from_torch, to_torch
from keras_bn.tools.recalibrate import Recalibrate, recalibrate
from keras_bn.version import __version__

__all__ = [
    "BatchNormalization",
    "Moments",
    "Recalibrate",
    "StatisticsLogger",
    "__version__",
    "compare",
    "diagnose",
    "fold",
    "freeze",
    "from_keras",
    "from_torch",
    "load_model",
    "plan_fold",
    "recalibrate",
    "renorm_ramp",
    "to_keras",
    "to_torch",
    "unfreeze",
]
