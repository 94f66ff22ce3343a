"""Running a function of tensors as one compiled TensorFlow function."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_bn.backends.tensorflow import gradients

# Traces kept of each function: more than any one model has layers that differ.
TRACES = 128


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` with `tf.function` for eager calls; inline it in graphs.

    An eager call then costs one dispatch instead of one for each op. Inside a graph
    the Python function runs as it is, so that nothing traced elsewhere is reused.

    One trace serves every size of the input: only its rank, dtype and channel sizes
    are fixed, as they are for a built layer. See the contract of the backends.
    """

    @functools.lru_cache(TRACES)
    def trace(specs, fixed):
        # A partial has no code of its own: TensorFlow would take the functions of many
        # layers for retraces of one, and warn.
        run = functools.partial(_run, function, specs, dict(fixed))
        present = [spec for spec in tf.nest.flatten(specs) if spec is not None]
        traced = tf.function(run, input_signature=present, autograph=False)
        # A concrete function takes half as long to call as one that may trace again.
        concrete = traced.get_concrete_function()
        weakref.finalize(concrete, gradients.forget, concrete.graph)
        return concrete

    @functools.wraps(function)
    def call(*tensors, **fixed):
        # Read each variable once, instead of wherever it is used.
        tensors = tf.nest.map_structure(
            lambda v: v if v is None else tf.convert_to_tensor(v), tensors
        )
        # The collectives of replicas can't be compiled alone.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if not tf.executing_eagerly() or replicas > 1:
            return function(*tensors, **fixed)
        rank, axes = len(tensors[0].shape), fixed["settings"].axes
        spec = functools.partial(_spec, rank=rank, axes=axes)
        specs = tf.nest.map_structure(spec, tensors)
        present = [t for t in tf.nest.flatten(tensors) if t is not None]
        return trace(specs, tuple(fixed.items()))(*present)

    return call


def _run(function, specs, fixed, *tensors):
    """`function` of the tensors, with None wherever there is no spec of one."""
    present = iter(tensors)
    flat = [None if s is None else next(present) for s in tf.nest.flatten(specs)]
    return function(*tf.nest.pack_sequence_as(specs, flat), **fixed)


def _spec(tensor, rank, axes):
    """What a trace fixes of a tensor: of the input and the mask, the channels alone."""
    if tensor is None:
        return None
    sizes = tensor.shape
    if len(sizes) == rank:
        sizes = [size if axis in axes else None for axis, size in enumerate(sizes)]
    return tf.TensorSpec(sizes, tensor.dtype)


def traced(
    function: Callable[..., Any], variables: Sequence[keras.Variable]
) -> Callable[..., Any]:
    """`function(batch, given)` as one graph for batches of any size; see the contract.

    TensorFlow finds the variables, and relaxes other sizes once they differ.
    """
    graph = tf.function(
        functools.partial(function), autograph=False, reduce_retracing=True
    )
    ready = False

    def run(batch, given):
        nonlocal ready
        if not ready:
            specs = tf.nest.map_structure(_of_any_size, batch)
            graph.get_concrete_function(specs, tf.nest.map_structure(_exactly, given))
            ready = True
        return graph(batch, given)

    return run


def _of_any_size(value):
    spec = _exactly(value)
    if isinstance(spec, tf.TensorSpec) and spec.shape.rank:
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
    return spec


def _exactly(value):
    return value if value is None else tf.type_spec_from_value(value)
