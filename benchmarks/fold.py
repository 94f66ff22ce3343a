"""Inference of folded models against the same models with normalization removed.

    python benchmarks/fold.py [--json FILE]

Medians of interleaved runs in one process, in graph mode.
"""

import argparse
import json
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.exchange import bypass
from keras_bn.surgery.graph import walk
from keras_bn.surgery.norms import is_normalization

MODELS = {"ResNet50": (96, 16), "MobileNetV2": (96, 16)}


def without_normalization(model):
    """A copy of a model whose batch normalizations are left out, not folded."""
    copy, _ = copy_model(model, compiled=False)
    bypass(copy, [layer for _, layer in walk(copy) if is_normalization(layer)])
    return copy


def measure(name, repeats=40):
    """Medians in ms: as it is, folded, and with normalization removed."""
    size, batch = MODELS[name]
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(size, size, 3), classes=10)
    models = {
        "keras": model,
        "folded": keras_bn.fold(model),
        "removed": without_normalization(model),
    }
    x = tf.random.normal((batch, size, size, 3))
    functions = {
        key: tf.function(lambda x, each=each: each(x, training=False))
        for key, each in models.items()
    }
    times: dict = {key: [] for key in functions}
    for function in functions.values():
        function(x)
    for _ in range(repeats):
        for key, function in functions.items():
            start = time.perf_counter()
            function(x).numpy()
            times[key].append(1e3 * (time.perf_counter() - start))
    result = {key: float(np.median(values)) for key, values in times.items()}
    ratios = np.divide(times["folded"], times["removed"])
    return {"model": name, **result, "ratio": float(np.median(ratios))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the results to a file")
    arguments = parser.parse_args()
    results = []
    print(f"{'ms':12}{'keras':>10}{'folded':>10}{'removed':>10}{'ratio':>8}")
    for name in MODELS:
        r = measure(name)
        results.append(r)
        columns = f"{r['keras']:10.1f}{r['folded']:10.1f}{r['removed']:10.1f}"
        print(f"{name:12}{columns}{r['ratio']:8.2f}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
