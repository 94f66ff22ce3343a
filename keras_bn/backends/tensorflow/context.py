"""What TensorFlow knows of where a batch is normalized."""

import contextlib

import tensorflow as tf

# TensorFlow has no public name for "is this graph compiled by XLA".
from tensorflow.python.ops import control_flow_util

from keras_bn.backends.plan import ONCE_UP_TO, Plan, by_size, elements, fused_fits
from keras_bn.backends.tensorflow import synced


def make_plan(x, mask, settings) -> Plan:
    """The plan for an input, here and now.

    Args:
        x: the input; its static shape is what counts.
        mask: None, or anything else if the batch is masked.
        settings: `axes`, `epsilon`, `group_size` and `synchronized` of the layer.
    """
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
        once=xla and elements(x.shape) <= ONCE_UP_TO,
        gpu=gpu,
    )


def pruned(x) -> bool:
    """Whether what nothing uses is left out: of graphs, it is."""
    return not tf.executing_eagerly()


def watched(loops: bool):
    """A context for values: called eagerly, TensorFlow has them all."""
    return contextlib.nullcontext()


def retrack(layer):
    """Nothing: TensorFlow finds variables in the attributes of a layer."""


def in_xla() -> bool:
    """Whether the graph being traced is compiled by XLA."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def on_gpu() -> bool:
    """Whether TensorFlow would put the ops of an eager call or a graph on a GPU."""
    if not tf.config.list_logical_devices("GPU"):
        return False
    return "CPU" not in tf.zeros([]).device.upper()
