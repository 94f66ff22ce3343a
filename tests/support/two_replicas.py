"""Converting, training and recalibrating under MirroredStrategy; run as a script."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

import keras_bn

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
rng = np.random.default_rng(0)
x = rng.normal(3.0, 2.0, (101, 4)).astype("float32")
y = rng.normal(size=(101, 3)).astype("float32")

with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(3),
        ]
    )
    model.compile("adam", "mse")
model.fit(x, y, batch_size=20, verbose=0)

ours = keras_bn.from_keras(model)
assert ours.distribute_strategy is strategy
assert int(ours.optimizer.iterations.numpy()) == 6
options = {"batch_size": 20, "shuffle": False, "verbose": 0}
a, b = (each.fit(x, y, **options).history["loss"] for each in (model, ours))
np.testing.assert_allclose(a, b, rtol=1e-4)

found = keras_bn.recalibrate(ours, x, batch_size=20, verbose=0)
np.testing.assert_array_equal(found["bn"].count, 101)
layer = ours.get_layer("bn")
for copy in strategy.experimental_local_results(layer.moving_mean.value):
    np.testing.assert_allclose(copy.numpy(), x.mean(0), rtol=1e-5)
for copy in strategy.experimental_local_results(layer.moving_variance.value):
    np.testing.assert_allclose(copy.numpy(), x.var(0), rtol=1e-5)
keras_bn.recalibrate(ours, x, exact=True, batch_size=20, verbose=0)
np.testing.assert_allclose(layer.moving_mean.numpy(), x.mean(0), rtol=1e-5)

callback = keras_bn.Recalibrate(x, batch_size=20)
ours.fit(x, y, epochs=2, callbacks=[callback], **options)
np.testing.assert_allclose(layer.moving_variance.numpy(), x.var(0), rtol=1e-5)
folded = keras_bn.fold(ours)
np.testing.assert_allclose(folded(x), ours(x), rtol=1e-4, atol=1e-5)
print("all hold")
