"""What TensorFlow knows of where a batch is normalized."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from keras_bn.backends.contract import Normalizing
from keras_bn.backends.plan import ONCE_UP_TO, Plan, by_size, elements, fused_fits
from keras_bn.backends.tensorflow import private, synced
from keras_bn.moments import Tensor


def make_plan(x: Tensor, mask: Tensor | None, settings: Normalizing) -> Plan:
    """The plan for an input; see the contract of the backends."""
    shared = settings.synchronized and synced.active()
    special = mask is not None or settings.group_size is not None or shared
    xla, gpu = in_xla(), on_gpu()
    fits = fused_fits(x.dtype.name, settings.axes, settings.epsilon, gpu)
    if special or xla or not fits:
        kernel = "plain"
    else:
        kernel = "fused" if gpu else by_size(x.shape, x.shape[settings.axes[0]])
    return Plan(
        kernel,
        settings.axes,
        settings.group_size,
        shared,
        xla=xla,
        once=xla and elements(x.shape) <= ONCE_UP_TO,
        gpu=gpu,
    )


def prunes(x: Tensor) -> bool:
    """Whether unused results cost nothing: not in graphs."""
    return not tf.executing_eagerly()


def current_trace() -> object:
    """The graph that is being traced; None eagerly."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def recording(loops: bool) -> AbstractContextManager[None]:
    """A context for values: called eagerly, TensorFlow has them all."""
    return contextlib.nullcontext()


def in_xla() -> bool:
    """Whether the graph being traced is compiled by XLA."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    return private.in_xla(graph)


def on_gpu() -> bool:
    """Whether TensorFlow would put the ops of an eager call or a graph on a GPU."""
    if not tf.config.list_logical_devices("GPU"):
        return False
    return "CPU" not in tf.zeros([]).device.upper()


def is_of_workers(strategy: Any) -> bool:
    """Whether a value is a strategy of one process for each worker."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def present_strategy() -> tf.distribute.Strategy:
    """The strategy in force here: a default one outside of any scope."""
    return tf.distribute.get_strategy()
