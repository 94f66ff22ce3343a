"""What works on a Keras without the private names, and what each tool says there.

Prints a line for each tool, its name and the message of its error.
"""

import sys
import warnings

import keras
import numpy as np

import keras_bn

assert "inside" in keras.Model.__module__, keras.Model.__module__

folder = sys.argv[1]
rng = np.random.default_rng(0)
x, y = rng.normal(2.0, 3.0, (64, 8)), rng.normal(size=(64, 1))
masked = rng.normal(size=(16, 5, 3))
masked[:, 3:] = 0.0

# The layer trains, alone and behind a mask; its files can be read again.
for inputs, targets, first in (
    (x, y, keras.layers.Dense(8)),
    (masked, masked[:, :, :1], keras.layers.Masking()),
):
    shape = inputs.shape[1:]
    bn = keras_bn.BatchNormalization(name="bn", momentum=0.9)
    model = keras.Sequential([keras.Input(shape), first, bn, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(inputs, targets, epochs=2, verbose=0)
    assert np.abs(keras.ops.convert_to_numpy(bn.moving_mean)).max() > 0.01
    want = model.predict(inputs, verbose=0)
    model.save(f"{folder}/model.keras")
    loaded = keras.saving.load_model(f"{folder}/model.keras")
    np.testing.assert_array_equal(loaded.predict(inputs, verbose=0), want)
    model.save_weights(f"{folder}/model.weights.h5")
    loaded.load_weights(f"{folder}/model.weights.h5")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone.predict(inputs, verbose=0), want)
    bn.freeze_statistics = True
    model.compile("sgd", "mse")
    before = keras.ops.convert_to_numpy(bn.moving_mean)
    model.fit(inputs, targets, verbose=0)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(bn.moving_mean), before)

state = {"running_mean": np.ones(3), "running_var": np.ones(3)}
assert keras_bn.from_torch(state, rank=2).built

TOOLS = {
    "from_keras": lambda: keras_bn.from_keras(model),
    "replace": lambda: keras_bn.replace(model),
    "to_keras": lambda: keras_bn.to_keras(model, in_place=True),
    "fold": lambda: keras_bn.fold(model),
    "functional": lambda: keras_bn.functional(model),
    "plan_fold": lambda: keras_bn.plan_fold(model),
    "freeze": lambda: keras_bn.freeze(model),
    "unfreeze": lambda: keras_bn.unfreeze(model),
    "FreezeAfter": lambda: keras_bn.FreezeAfter(3),
    "recalibrate": lambda: keras_bn.recalibrate(model, x),
    "Recalibrate": lambda: keras_bn.Recalibrate(x),
    "adapt": lambda: keras_bn.adapt(model),
    "unadapt": lambda: keras_bn.unadapt(model),
    "statistics": lambda: keras_bn.statistics(model, x),
    "set_statistics": lambda: keras_bn.set_statistics(model, {}),
    "using": lambda: keras_bn.using(model, {}).__enter__(),
    "diagnose": lambda: keras_bn.diagnose(model, x),
    "fix": lambda: keras_bn.fix(model, None, x),
    "StatisticsLogger": lambda: keras_bn.StatisticsLogger(x),
    "quantize_aware": lambda: keras_bn.quantize_aware(model, x),
    "export_int8": lambda: keras_bn.export_int8(model, f"{folder}/model.tflite", x),
    "load_model": lambda: keras_bn.load_model(f"{folder}/model.keras"),
}
weights = model.get_weights()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    for name, tool in TOOLS.items():
        try:
            tool()
        except RuntimeError as error:
            print(name, error, sep="\t")
for before, after in zip(weights, model.get_weights(), strict=True):
    np.testing.assert_array_equal(before, after)
