"""What the layer is measured against, each as a chain of layers in one function."""

import keras
import numpy as np
from keras import ops

import keras_bn
from keras_bn import verify
from keras_bn.backends import modes

MOMENTUM, EPSILON = 0.99, 1e-3


class FusedOp(keras.Layer):
    """TensorFlow's fused op as it is, with the moving statistics it is used with.

    Its variance is the unbiased one and its accuracy its own: a floor for speed.
    """

    def build(self, shape):
        c = shape[-1]
        self.gamma = self.add_weight(shape=(c,), initializer="ones")
        self.beta = self.add_weight(shape=(c,), initializer="zeros")
        state = {"shape": (c,), "trainable": False}
        self.mean = self.add_weight(initializer="zeros", **state)
        self.variance = self.add_weight(initializer="ones", **state)

    def call(self, x, training=None):
        import tensorflow as tf

        c = x.shape[-1]
        inner = x if len(x.shape) == 4 else tf.reshape(x, [-1, 1, 1, c])
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inner, self.gamma.value, self.beta.value, epsilon=EPSILON
        )
        for moving, new in ((self.mean, mean), (self.variance, variance)):
            moving.assign(moving * MOMENTUM + new * (1 - MOMENTUM))
        return y if len(x.shape) == 4 else tf.reshape(y, tf.shape(x))


def pytorch(shape, axis=-1, training=True):
    """The same chain in PyTorch on two threads; None where it is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    c = shape[axis]
    sizes = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    sizes.insert(1, c)
    norm = [torch.nn.BatchNorm1d] * 2 + [torch.nn.BatchNorm2d, torch.nn.BatchNorm3d]
    make = norm[len(shape) - 2]
    layers = [make(c, eps=EPSILON, momentum=0.01) for _ in range(verify.depth(shape))]
    model = torch.nn.Sequential(*layers).train(training)
    x, upstream = (
        torch.tensor(rng.normal(size=sizes).astype("float32")) for _ in range(2)
    )
    if not training:
        return torch.no_grad()(lambda: model(x))
    x.requires_grad_(True)

    def step():
        model.zero_grad()
        x.grad = None
        model(x).backward(upstream)

    return step


def torch_nn(shape, axis=-1, dtype="float32"):
    """PyTorch's layers on the memory that Keras's PyTorch backend gives its own."""
    import torch

    rng = np.random.default_rng(0)
    draws = [rng.normal(size=shape).astype("float32") for _ in range(2)]
    x, upstream = (ops.convert_to_tensor(each, dtype) for each in draws)
    make = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    how = {"eps": EPSILON, "momentum": 1 - MOMENTUM, "device": x.device}
    layers = [make(shape[axis], **how) for _ in range(verify.depth(shape))]
    weights = [weight for each in layers for weight in each.parameters()]

    def step():
        y = start = x.detach().requires_grad_()
        for each in layers:
            y = each(y.movedim(axis, 1)).movedim(1, axis)
        return modes.wait(torch.autograd.grad(y, [start, *weights], upstream))

    return step


def flax(shape, axis=-1, training=True):
    """The same chain in Flax, always compiled by XLA; None where it isn't installed."""
    try:
        import jax
        from flax import nnx
    except ModuleNotFoundError:
        return None
    rng = np.random.default_rng(0)
    x, upstream = (
        jax.numpy.asarray(rng.normal(size=shape).astype("float32")) for _ in range(2)
    )
    how = {"momentum": MOMENTUM, "epsilon": EPSILON, "axis": axis}
    layers = [
        nnx.BatchNorm(shape[axis], **how, rngs=nnx.Rngs(0))
        for _ in range(verify.depth(shape))
    ]
    model = nnx.Sequential(*layers)
    model.train() if training else model.eval()

    @nnx.jit
    def infer(model, x):
        return model(x)

    @nnx.jit
    def step(model, x, upstream):
        def product(model, x):
            y = model(x)
            return (y * upstream).sum(), y

        return nnx.grad(product, argnums=(0, 1), has_aux=True)(model, x)

    if not training:
        return lambda: jax.block_until_ready(infer(model, x))
    return lambda: jax.block_until_ready(step(model, x, upstream))


def functions(
    shape,
    mode="graph",
    axis=-1,
    training=True,
    backward=True,
    known=False,
    others=True,
    **options,
):
    """The peers' chains for an input of this shape, by name.

    TensorFlow's are traced with the batch size unknown, as in `fit`. With all sizes
    `known`, there are Keras's and ours alone; without `others`, TensorFlow's.
    """
    peers = {
        verify.PEER: lambda: keras.layers.BatchNormalization(axis=axis, **options),
        verify.OURS: lambda: keras_bn.BatchNormalization(axis=axis, **options),
    }
    alone = known or bool(options)
    if training and mode == "graph" and axis == -1 and not alone:
        peers["fused op"] = FusedOp
    dtype = keras.DTypePolicy(options.get("dtype", "float32")).compute_dtype
    how = mode, training, dtype, backward, known
    chains = {n: verify.chain(m, shape, *how) for n, m in peers.items()}
    if alone or not backward or not others:
        return chains
    found = {
        "PyTorch": pytorch(shape, axis, training),
        "Flax": flax(shape, axis, training),
    }
    return chains | {n: chain for n, chain in found.items() if chain is not None}
