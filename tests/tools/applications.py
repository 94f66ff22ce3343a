"""Every model of keras.applications with batch normalization, through every tool.

python tests/tools/applications.py [NAME ...] [--write docs/applications.md]
"""

import argparse
import gc
import inspect
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# By family, at the smallest input that the model takes.
SIZES = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71, "NASNet": 32}
# What continuous integration runs: one of each kind of block.
SUBSET = ("MobileNet", "MobileNetV2", "DenseNet121", "EfficientNetV2B0", "ResNet50V2")
# Without a batch normalization in them.
WITHOUT = ("VGG", "ConvNeXt")
COLUMNS = {
    "norms": "normalizations",
    "own": "a rounding, Δ",
    "convert": "converted, Δ",
    "train": "one step, Δ loss",
    "folded": "folded",
    "fold": "folded, Δ",
    "own_batch": "a rounding in training, Δ",
    "recalibrate": "recalibrated, Δ",
    "export": "exported, Δ",
    "seconds": "s",
}


def names():
    """The applications that contain a batch normalization."""
    import keras

    found = vars(keras.applications).items()
    return sorted(
        name
        for name, make in found
        if inspect.isfunction(make) and not name.startswith(WITHOUT)
    )


def build(name):
    """An application with random weights and statistics, small in input and classes."""
    import keras

    size = next((s for family, s in SIZES.items() if name.startswith(family)), 32)
    make = getattr(keras.applications, name)
    keras.utils.set_random_seed(0)
    options = {"weights": None, "input_shape": (size, size, 3), "classes": 10}
    if "include_preprocessing" in inspect.signature(make).parameters:
        options["include_preprocessing"] = False
    model = make(**options, classifier_activation=None)
    randomize(model)
    return model


def randomize(model, affine=True):
    """Give the normalizations of a model random statistics.

    Args:
        affine: whether gamma and beta become random, too.
    """
    import keras
    import numpy as np

    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(rng.normal(0.0, 0.3, shape))
            layer.moving_variance.assign(rng.uniform(0.5, 2.0, shape))
            if affine and layer.beta is not None:
                layer.beta.assign(rng.normal(0.0, 0.3, shape))
            if affine and layer.gamma is not None:
                layer.gamma.assign(rng.uniform(0.5, 1.5, shape))


def check(name):
    """Convert, train a step, fold, recalibrate and export one application.

    Returns:
        A dict with a figure for each of `COLUMNS`. Differences are the largest of the
        outputs, relative to their spread.
    """
    import keras
    import numpy as np
    import tensorflow as tf

    import keras_bn
    from keras_bn.tools.compare import random_inputs, relative_difference

    start = time.time()
    model = build(name)
    x = random_inputs(model)
    expected = model(x, training=False)
    own = relative_difference(expected, model(_rounded(x), training=False))
    ours = keras_bn.from_keras(model)
    result = {"name": name, "own": own}
    result["convert"] = relative_difference(expected, ours(x))
    plan = keras_bn.plan_fold(ours)
    result["norms"] = len(plan)
    result["folded"] = sum(each.into is not None for each in plan)

    folded = keras_bn.fold(ours)
    result["fold"] = relative_difference(expected, folded(x))
    with tempfile.TemporaryDirectory() as folder:
        folded.export(folder, verbose=False)
        loaded = tf.saved_model.load(folder)
        served = loaded.serve(x)
        result["export"] = relative_difference(expected, served)
        del loaded, served
    del folded
    gc.collect()

    # Enough samples that a statistic over one pixel each doesn't hang by a thread.
    x, y = random_inputs(model, 16), np.arange(16) % 10
    found = keras_bn.recalibrate(ours, x, verbose=0)
    assert len(found) == result["norms"]
    batch = ours(x, training=False)
    whole = keras_bn.from_keras(ours)
    # One batch was all the data, so that batch statistics give what inference gives.
    for layer in _dropouts(whole):
        layer.rate = 0.0
    trained = whole(x, training=True)
    result["recalibrate"] = relative_difference(batch, trained)
    nearby = whole(_rounded(x), training=True)
    result["own_batch"] = relative_difference(trained, nearby)
    del whole
    gc.collect()

    losses = []
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for each in model, keras_bn.from_keras(model):
        for layer in _dropouts(each):
            layer.rate = 0.0
        each.compile(keras.optimizers.SGD(1e-3), loss, jit_compile=False)
        first = float(each.train_on_batch(x, y))
        losses.append((first, float(each.train_on_batch(x, y))))
        gc.collect()
    (theirs, theirs_after), (mine, mine_after) = losses
    assert np.isfinite([theirs, mine, mine_after]).all()
    assert abs(mine_after - mine) > 0
    result["train"] = abs(mine - theirs) / abs(theirs)
    result["train_after"] = abs(mine_after - theirs_after) / abs(theirs_after)
    result["seconds"] = time.time() - start
    return {k: v if isinstance(v, str) else float(v) for k, v in result.items()}


def _rounded(x):
    """The inputs, each off by one rounding of float32."""
    import numpy as np

    up = np.random.default_rng(1).integers(0, 2, x.shape)
    return np.nextafter(np.asarray(x), np.where(up, np.inf, -np.inf).astype("float32"))


def _dropouts(model):
    return [layer for layer in model._flatten_layers() if hasattr(layer, "rate")]


def holds(result):
    """Whether all figures of an application are as they should be.

    Some of these networks are so deep that they multiply a rounding beyond the usual
    bounds: there, what one rounding of the input does to Keras's own model is allowed
    once for every normalization, each of which rounds.
    """
    roundings = 1 + result["norms"]
    usual = max(1e-4, roundings * result["own"])
    bounds = dict.fromkeys(("convert", "fold", "export"), usual)
    bounds["recalibrate"] = max(1e-3, roundings * result["own_batch"])
    bounds["train"] = 1e-3
    return all(result[key] < bound for key, bound in bounds.items())


def table(results):
    """The results as a table in Markdown."""
    lines = [
        "| application | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for result in results:
        cells = [
            f"{result[key]:.0f}"
            if key in ("norms", "folded", "seconds")
            else f"{result[key]:.0e}"
            for key in COLUMNS
        ]
        lines.append(f"| {result['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="applications; all by default")
    parser.add_argument(
        "--subset", action="store_true", help="only " + ", ".join(SUBSET)
    )
    parser.add_argument("--write", metavar="FILE", help="write the table to a file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(check(arguments.names[0])))
        return 0
    results, failed = [], []
    for name in arguments.names or (SUBSET if arguments.subset else names()):
        # A process each, so that memory is given back.
        command = [sys.executable, __file__, name, "--one"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(
                f"{done.stderr[-3000:]}\n{name} FAILED ({done.returncode})", flush=True
            )
            failed.append(name)
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        if not holds(results[-1]):
            print(f"{name} is off: {results[-1]}")
    if arguments.write:
        file = Path(arguments.write)
        text = file.read_text() if file.exists() else ""
        before, _, rest = text.partition("| application |")
        _, blank, after = rest.partition("\n\n")  # what stands below the table
        file.write_text(before + table(results) + blank[1:] + after)
    return 0 if all(map(holds, results)) and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
