"""Script: load every .keras file of a folder with nothing but the package imported."""

import pathlib
import sys

import keras
import numpy as np

import keras_bn

for path in pathlib.Path(sys.argv[1]).glob("*.keras"):
    model = keras.saving.load_model(path)
    assert keras_bn.BatchNormalization in map(type, model.layers)
    arrays = np.load(path.with_suffix(".npz"))
    got = keras.ops.convert_to_numpy(model(arrays["x"], training=False))
    assert got.tobytes() == arrays["y"].tobytes(), path
    print(path.stem)
