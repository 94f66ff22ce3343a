"""Running a function of tensors as one compiled TensorFlow function."""

import functools

import tensorflow as tf

from keras_bn.kernels import dispatch


def compiled(function):
    """Compile `function` with `tf.function` for eager calls; inline it in graphs.

    An eager call then costs one dispatch instead of one for each op. Inside a graph
    the Python function runs as it is, so that what is being traced (static sizes, an
    XLA context) stays visible to it and nothing traced elsewhere is reused.

    One trace serves every size of the input that wants the same kernel: only its
    rank, dtype and channel sizes are fixed, as they are for a built layer.

    Args:
        function: `function(x, mask, *parameters, axes, **options)`. `x` is the input,
            `mask` has its shape without the channel axes, `parameters` have one value
            per channel; any but `x` may be None. `axes` and `options` must be
            hashable and are fixed in the trace.

    Returns:
        A function with the same arguments and the same returns.
    """

    @functools.cache
    def trace(specs, options, large, gpu):
        # `gpu` is asked for while tracing: here it only tells traces apart.
        # A partial has no code of its own: TensorFlow would take the functions of
        # many layers for retraces of one, and warn.
        run = functools.partial(_run, function, specs, options, large)
        present = [spec for spec in specs if spec is not None]
        compiled = tf.function(run, input_signature=present, autograph=False)
        # A concrete function takes half as long to call as one that may trace again.
        return compiled.get_concrete_function()

    @functools.wraps(function)
    def call(x, mask, *parameters, axes, **options):
        if not tf.executing_eagerly() or _replicas() > 1:
            # A variable would be read anew wherever it is used.
            read = (None if p is None else tf.convert_to_tensor(p) for p in parameters)
            return function(x, mask, *read, axes=axes, **options)
        sizes = [d if i in axes else None for i, d in enumerate(x.shape)]
        specs = [tf.TensorSpec(sizes, x.dtype)]
        specs.append(None if mask is None else _spec(mask, [None] * len(mask.shape)))
        specs += [None if p is None else _spec(p, p.shape) for p in parameters]
        present = (t for t in (x, mask, *parameters) if t is not None)
        given = map(tf.convert_to_tensor, present)
        fixed = tuple(sorted({**options, "axes": axes}.items()))
        large, gpu = dispatch.is_large(x.shape), dispatch.on_gpu()
        return trace(tuple(specs), fixed, large, gpu)(*given)

    return call


def _run(function, specs, options, large, *tensors):
    """`function` of the tensors; None, which is none, is put back in its place."""
    given = iter(tensors)
    arguments = [None if spec is None else next(given) for spec in specs]
    with dispatch.assuming(large):
        return function(*arguments, **dict(options))


def _spec(tensor, shape):
    return tf.TensorSpec(shape, tensor.dtype)


def _replicas():
    """How many replicas are in step here: their collectives can't be compiled alone."""
    return tf.distribute.get_strategy().num_replicas_in_sync
