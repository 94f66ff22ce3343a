"""Strategies of one process for each worker."""

from typing import Any

import tensorflow as tf


def is_of_workers(strategy: Any) -> bool:
    """Whether a value is a strategy of one process for each worker."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def present_strategy() -> tf.distribute.Strategy:
    """The strategy in force here: a default one outside of any scope."""
    return tf.distribute.get_strategy()
