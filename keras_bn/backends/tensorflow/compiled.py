"""Running a function of tensors as one compiled TensorFlow function."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_bn.backends.tensorflow import gradients
from keras_bn.backends.tensorflow.context import make_plan

# Traces kept of each function: more than any one model has layers that differ.
TRACES = 128


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` with `tf.function` for eager calls; inline it in graphs.

    An eager call then costs one dispatch instead of one for each op. Inside a graph
    the Python function runs as it is, so that nothing traced elsewhere is reused.

    One trace serves every size of the input that has the same plan: only its rank,
    dtype and channel sizes are fixed, as they are for a built layer.

    Args:
        function: `function(x, mask, *arguments, settings, plan)`. `x` is the input,
            `mask` broadcasts to it, `arguments` are values per channel or named tuples
            of such; any but `x` may be None. `settings` (with `axes`, `epsilon`,
            `group_size` and `synchronized`) and the `Plan` are fixed in the trace.

    Returns:
        A function with the same arguments but `plan`, and the same returns.
    """

    @functools.lru_cache(TRACES)
    def trace(specs, settings, plan):
        # A partial has no code of its own: TensorFlow would take the functions of many
        # layers for retraces of one, and warn.
        run = functools.partial(_run, function, specs, settings, plan)
        present = [spec for spec in tf.nest.flatten(specs) if spec is not None]
        traced = tf.function(run, input_signature=present, autograph=False)
        # A concrete function takes half as long to call as one that may trace again.
        concrete = traced.get_concrete_function()
        weakref.finalize(concrete, gradients.forget, concrete.graph)
        return concrete

    @functools.wraps(function)
    def call(x, mask, *arguments, settings):
        plan = make_plan(x, mask, settings)
        # Read each variable once, instead of wherever it is used.
        arguments = tf.nest.map_structure(
            lambda v: v if v is None else tf.convert_to_tensor(v), (x, mask, *arguments)
        )
        # The collectives of replicas can't be compiled alone.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if not tf.executing_eagerly() or replicas > 1:
            return function(*arguments, settings=settings, plan=plan)
        spec = functools.partial(_spec, rank=len(x.shape), axes=settings.axes)
        specs = tf.nest.map_structure(spec, arguments)
        given = [t for t in tf.nest.flatten(arguments) if t is not None]
        return trace(specs, settings, plan)(*given)

    return call


def _run(function, specs, settings, plan, *tensors):
    """`function` of the tensors, with None wherever there is no spec of one."""
    given = iter(tensors)
    flat = [None if s is None else next(given) for s in tf.nest.flatten(specs)]
    arguments = tf.nest.pack_sequence_as(specs, flat)
    return function(*arguments, settings=settings, plan=plan)


def _spec(tensor, rank, axes):
    """What a trace fixes of a tensor: of the input and the mask, the channels alone."""
    if tensor is None:
        return None
    sizes = tensor.shape
    if len(sizes) == rank:
        sizes = [size if axis in axes else None for axis, size in enumerate(sizes)]
    return tf.TensorSpec(sizes, tensor.dtype)
