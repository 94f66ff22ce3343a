"""A step that also updates gamma and beta gives the output of the old ones."""

import numpy as np
import pytest
from support import backend
from support.forms import examples

import keras_bn

tf = backend.tensorflow("it reads and writes in one graph")


@pytest.mark.parametrize("arguments", [{}, {"renorm": True}])
@pytest.mark.parametrize("shape", [(4,), (32, 32, 16)])
def test_output_of_a_step_rests_on_the_weights_before_it(shape, arguments):
    """Of many layers at once, as a wrong order of reading shows only by chance."""
    x, upstream = tf.constant(examples(shape)), tf.constant(examples(shape, seed=2))
    layers = [keras_bn.BatchNormalization(**arguments) for _ in range(10)]
    for layer in layers:
        layer.build(x.shape)

    @tf.function(autograph=False)
    def step(x):
        outputs = []
        for layer in layers:
            weights = [w.value for w in layer.trainable_weights]
            with tf.GradientTape() as tape:
                y = layer(x, training=True)
            gradients = tape.gradient(y, weights, upstream)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.assign_sub(gradient)
            outputs.append(y)
        return outputs

    fresh = keras_bn.BatchNormalization(**arguments)
    want = fresh(x, training=True)
    for y in step(x):
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
