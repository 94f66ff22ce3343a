"""Write small artifacts of the present version, for every later one to open.

    python saved_models/write.py            into saved_models/v<version>
    python saved_models/write.py --force    the same, over what is there

The numbers are the same each time on one machine; the files are not, byte for byte,
because Keras and TensorFlow put times and identifiers into them.
"""

import argparse
import json
import platform
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_bn

HERE = Path(__file__).parent


def trained_model():
    """Conv → BN → ReLU → Pooling → Dense → BN, compiled, after eight steps."""
    keras.utils.set_random_seed(2015)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, use_bias=False),
            keras_bn.BatchNormalization(momentum=0.8),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5),
            keras_bn.BatchNormalization(momentum=0.8, epsilon=1e-5),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 2, (64, 8, 8, 3)), rng.normal(3, 1, (64, 5))
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    return model


def versions():
    """What the artifacts were written with."""
    return {
        "keras_bn": keras_bn.__version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def write(folder):
    """Write every artifact into an empty folder.

    Args:
        folder: path of the folder, which is made.
    """
    folder.mkdir(parents=True)
    model = trained_model()
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    model.export(folder / "exported", verbose=False)
    inputs = np.random.default_rng(1).normal(1, 2, (6, *model.input_shape[1:]))
    inputs = inputs.astype("float32")
    outputs = np.asarray(model(inputs, training=False))
    np.savez(folder / "io.npz", inputs=inputs, outputs=outputs)
    (folder / "info.json").write_text(json.dumps(versions(), indent=2) + "\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=HERE, help="parent folder")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args(arguments)
    folder = options.into / f"v{keras_bn.__version__}"
    if folder.exists():
        if not options.force:
            sys.exit(f"{folder} exists, and a version is written once; or use --force")
        shutil.rmtree(folder)
    write(folder)
    print(folder)


if __name__ == "__main__":
    main()
