"""What the tests ask of Keras's backend: arrays, modes, gradients.

It takes nothing from the package, whose kernels have their own ways.

`tf`
    TensorFlow, or what skips a test that takes anything from it.
`in_mode(function, mode, variables)`
    A function of tensors, run in one of the `MODES`. `variables` are the Keras
    variables that it reads or assigns.
`training_step(function, variables, mode)`
    A function of `x` and an upstream gradient that gives `function(x)` and a list: the
    gradients of `sum(upstream * function(x))` by `x` and by each trainable variable.
    It assigns what the function assigns.
`vjp(function, arguments, upstream, again=False)`
    `(y, gradients)` of a function without effects, here and now. `y` may be followed by
    what has no gradient: then `function` gives `(y, others)`, and so does this.
    `again`: whether the gradients will be differentiated.
`descend(loss, optimizer, variables)`
    A step of an optimizer down the gradient of `loss()`, for a training step of one's
    own inside `fit`; gives the loss. There is none on JAX, where such a step is
    written without effects.
`dataset(parts, batch)`
    Arrays, as the backend's own data set: a tuple, in which a part may be a dict.
`call(layer, values, x, training=True, ...)`
    The layer's output with these values for its trainable variables, to be
    differentiated by them; without an effect on JAX, where only that can be.
"""

import functools
import importlib

import keras
import numpy as np
import pytest
from keras import ops

NAME = keras.backend.backend()

# Elsewhere Keras's layer computes float64 in float32, and loses large means.
KERAS_IS_A_JUDGE = NAME == "tensorflow"


def eagerly_too(modes):
    """The modes for a test of many shapes: JAX is slow to compile op by op."""
    return tuple(mode for mode in modes if NAME != "jax" or mode != "eager")


def only(backend, reason):
    """A mark for what cannot apply on other backends."""
    return pytest.mark.skipif(backend != NAME, reason=f"{backend} only: {reason}")


def but_on(backend, reason):
    """A mark for what cannot apply on one backend."""
    return pytest.mark.skipif(backend == NAME, reason=f"not on {backend}: {reason}")


def tensorflow(reason):
    """The module; on other backends the test, or the file of tests, is skipped."""
    if NAME != "tensorflow":
        pytest.skip(f"tensorflow only: {reason}", allow_module_level=True)
    return importlib.import_module("tensorflow")


class _Absent:
    """Stands for TensorFlow on other backends: what uses it there is skipped."""

    def __getattr__(self, name):
        if name.startswith("__"):  # pytest looks for these in every module
            raise AttributeError(name)
        pytest.skip(f"tensorflow only: it takes tf.{name}", allow_module_level=True)


def tensor(x, dtype=None):
    return ops.convert_to_tensor(x, dtype)


def array(x):
    """Anything tensor-like as a float64 array."""
    return np.asarray(ops.convert_to_numpy(x)).astype(np.float64)


if NAME == "tensorflow":
    import tensorflow as tf

    MODES = ("eager", "graph", "xla")
    COMPILED = "graph"

    def in_mode(function, mode, variables=()):
        if mode == "eager":
            return function
        # A partial, or TensorFlow takes every new test for a retrace of one function.
        function = functools.partial(function)
        return tf.function(function, jit_compile=mode == "xla", autograph=False)

    def training_step(function, variables, mode):
        weights = [v.value for v in variables if v.trainable]

        def run(x, upstream):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x)
            return y, tape.gradient(y, [x, *weights], output_gradients=upstream)

        return in_mode(run, mode)

    def vjp(function, arguments, upstream, again=False):
        with tf.GradientTape() as tape:
            tape.watch([a for a in arguments if not isinstance(a, tf.Variable)])
            result = function(*arguments)
        y = result[0] if isinstance(result, tuple) else result
        return result, tape.gradient(y, list(arguments), output_gradients=upstream)

    def descend(loss, optimizer, variables):
        with tf.GradientTape() as tape:
            value = loss()
        optimizer.apply(tape.gradient(value, variables), variables)
        return value

    def dataset(parts, batch):
        return tf.data.Dataset.from_tensor_slices(parts).batch(batch)

    def call(layer, values, x, training=True, **options):
        return layer(x, training=training, **options)

elif NAME == "torch":
    import torch

    tf = _Absent()
    MODES = ("eager",)
    COMPILED = "eager"

    def in_mode(function, mode, variables=()):
        assert mode in MODES
        return function

    def training_step(function, variables, mode):
        weights = [v.value for v in variables if v.trainable]

        def run(x, upstream):
            return vjp(lambda x, *weights: function(x), [x, *weights], upstream)

        return in_mode(run, mode)

    def vjp(function, arguments, upstream, again=False):
        arguments = [
            a if a.requires_grad else a.detach().requires_grad_() for a in arguments
        ]
        result = function(*arguments)
        y = result[0] if isinstance(result, tuple) else result
        gradients = torch.autograd.grad(
            y, arguments, upstream, create_graph=again, allow_unused=True
        )
        return result, list(gradients)

    def descend(loss, optimizer, variables):
        value = loss()
        gradients = torch.autograd.grad(value, [v.value for v in variables])
        with torch.no_grad():
            optimizer.apply(gradients, variables)
        return value.detach()

    def dataset(parts, batch):
        def sample(i):
            return keras.tree.map_structure(lambda a: a[i], parts)

        samples = [sample(i) for i in range(len(parts[0]))]
        return torch.utils.data.DataLoader(samples, batch_size=batch)

    def call(layer, values, x, training=True, **options):
        return layer(x, training=training, **options)

else:
    import jax

    tf = _Absent()
    descend = None
    MODES = ("eager", "xla")
    COMPILED = "xla"

    def _pure(function, variables):
        def run(values, *arguments):
            with keras.StatelessScope(zip(variables, values, strict=True)) as scope:
                result = function(*arguments)
            return result, [scope.get_current_value(v) for v in variables]

        return run

    def _assigning(pure, variables):
        def run(*arguments):
            result, new = pure([v.value for v in variables], *arguments)
            for variable, value in zip(variables, new, strict=True):
                variable.assign(value)
            return result

        return run

    def in_mode(function, mode, variables=()):
        if mode == "eager":
            return function
        variables = list(variables)
        return _assigning(jax.jit(_pure(function, variables)), variables)

    def training_step(function, variables, mode):
        trained = [v for v in variables if v.trainable]
        others = [v for v in variables if not v.trainable]
        pure = _pure(function, trained + others)

        def run(values, x, upstream):
            weights, rest = values[: len(trained)], values[len(trained) :]

            def inner(x, weights):
                y, new = pure([*weights, *rest], x)
                return y, new[len(trained) :]

            y, pull, new = jax.vjp(inner, x, weights, has_aux=True)
            dx, d_weights = pull(upstream)
            return (y, [dx, *d_weights]), [*weights, *new]

        run = jax.jit(run) if mode == "xla" else run
        return _assigning(run, trained + others)

    def vjp(function, arguments, upstream, again=False):
        def inner(*arguments):
            result = function(*arguments)
            return result if isinstance(result, tuple) else (result, None)

        y, pull, others = jax.vjp(inner, *arguments, has_aux=True)
        return y if others is None else (y, others), list(pull(upstream))

    class Batches(keras.utils.PyDataset):
        """JAX has no data set of its own."""

        def __init__(self, parts, batch):
            super().__init__()
            self.parts, self.batch = parts, batch

        def __len__(self):
            return -(-len(self.parts[0]) // self.batch)

        def __getitem__(self, index):
            rows = slice(index * self.batch, (index + 1) * self.batch)
            return keras.tree.map_structure(lambda a: a[rows], self.parts)

    def dataset(parts, batch):
        return Batches(parts, batch)

    def call(layer, values, x, training=True, **options):
        state = [v.value for v in layer.non_trainable_variables]
        y, _ = layer.stateless_call(values, state, x, training=training, **options)
        return y
