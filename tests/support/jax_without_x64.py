"""On JAX as it is, without float64: prints "all hold" if a layer and `verify` cope."""

import warnings

import jax
import keras
import numpy as np

import keras_bn
from keras_bn.verify import cases, judge

assert keras.backend.backend() == "jax"
assert not jax.config.jax_enable_x64
rng = np.random.default_rng(0)
x = rng.normal(1e4, 1.0, (256, 3))

# JAX says itself that float64 becomes float32, and names the setting.
layer = keras_bn.BatchNormalization(dtype="float64", momentum=0.5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = layer(x, training=True)
assert any("jax_enable_x64" in str(each.message) for each in caught)
warnings.simplefilter("ignore")

# Then everything is as with dtype="float32", to the bit.
single = keras_bn.BatchNormalization(dtype="float32", momentum=0.5)
np.testing.assert_array_equal(y, single(x, training=True))
assert y.dtype == "float32"
for a, b in zip(layer.weights, single.weights, strict=True):
    np.testing.assert_array_equal(a, b)
rounded = x.astype("float32").astype("float64")
want = (rounded - rounded.mean(0)) / np.sqrt(rounded.var(0) + 1e-3)
assert np.abs(np.asarray(y) - want).max() < 1e-5

# Passes over data merge in NumPy: they lose nothing of what the batches were.
model = keras.Sequential([keras.Input((3,)), layer])
found = keras_bn.recalibrate(model, x, batch_size=32, verbose=0)
(moments,) = found.values()
assert moments.mean.dtype == "float64"
np.testing.assert_allclose(moments.mean, rounded.mean(0), rtol=1e-7)
np.testing.assert_allclose(moments.variance, rounded.var(0), rtol=1e-4)

# `verify` leaves float64 out and says why; the rest passes.
double, plain = judge.verify(
    [cases.Case((32, 4), -1, dtype, "xla") for dtype in ("float64", "float32")]
)
assert "float64 is not enabled" in str(double), double
assert not double.checks
assert plain.checks
assert all(check.strain <= 1 for check in plain.checks)
print("all hold")
