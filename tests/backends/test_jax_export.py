"""Steps that JAX exports for a batch of any size, or differentiates in forward mode."""

import numpy as np
import pytest
from support import backend

import keras_bn

if backend.NAME != "jax":
    pytest.skip("jax only: `jax.export`", allow_module_level=True)

import jax
from jax import export


def exported(training, **options):
    """An exported call of a layer, on a batch of any size; and the layer."""
    layer = keras_bn.BatchNormalization(momentum=0.0, **options)
    layer.build((None, 3))
    state = [v.value for v in layer.non_trainable_variables]
    weights = [v.value for v in layer.trainable_variables]

    def call(x):
        return layer.stateless_call(weights, state, x, training=training)

    (size,) = export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((size, 3), "float32")
    return export.export(jax.jit(call))(x), layer


@pytest.mark.parametrize("size", [2, 8, np.int64(4)])
def test_groups_of_a_batch_of_any_size_are_refused_in_words(size):
    with pytest.raises(ValueError, match="export the step for a batch of a fixed size"):
        exported(True, virtual_batch_size=size)


@pytest.mark.parametrize(
    ("training", "options"),
    [(True, {}), (True, {"debias": True}), (False, {"virtual_batch_size": 8})],
)
def test_what_needs_no_size_is_exported(training, options):
    call, layer = exported(training, **options)
    for rows in (2, 7):
        x = np.random.default_rng(0).normal(3, 2, (rows, 3)).astype("float32")
        y, _ = call.call(x)
        expected = layer(x, training=training)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_a_training_step_differentiates_in_forward_mode():
    layer = keras_bn.BatchNormalization(name="bn")
    layer.build((None, 3))
    state = [v.value for v in layer.non_trainable_variables]
    weights = [v.value for v in layer.trainable_variables]
    rng = np.random.default_rng(0)
    x, upstream, tangent = rng.normal(size=(3, 8, 3))

    def call(x):
        return layer.stateless_call(weights, state, x, training=True)[0]

    _, forward = jax.jvp(call, (x,), (tangent,))
    (backward,) = jax.vjp(call, x)[1](upstream.astype(call(x).dtype))
    np.testing.assert_allclose(
        (forward * upstream).sum(), (backward * tangent).sum(), rtol=1e-4
    )
