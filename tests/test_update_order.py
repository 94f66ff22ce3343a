"""A step that also updates gamma and beta gives the output of the old ones."""

import numpy as np
import pytest
import tensorflow as tf
from forms import examples

import keras_bn


@pytest.mark.parametrize(
    "arguments", [{}, {"renorm": True, "renorm_clipping": {"rmax": 1.5}}]
)
def test_output_of_a_step_rests_on_the_weights_before_it(arguments):
    """Of many layers at once, as a wrong order of reading shows only by chance."""
    x, upstream = tf.constant(examples((4,))), tf.constant(examples((4,), seed=2))
    layers = [keras_bn.BatchNormalization(**arguments) for _ in range(10)]
    for layer in layers:
        layer.build((None, 4))

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
