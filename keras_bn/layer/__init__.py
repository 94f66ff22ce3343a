"""The layer: what it computes, in training and inference, and what it stores.

Saved files name this module, so `BatchNormalization` can be imported from here.
"""

from keras_bn.layer.batch_normalization import BatchNormalization

__all__ = ["BatchNormalization"]
