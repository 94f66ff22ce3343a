"""Passes over data and `adapt` beside `predict` and `fit`: python -m benchmarks.passes.

CPU time, in turn in one process: ratios that hold on a machine that is not quiet, too.
Each pass goes over the same data after everything has been traced, but for the whole
calls. On Keras's PyTorch backend, PyTorch's own `update_bn` on the same network.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_bn
from benchmarks import markdown, memory
from keras_bn.diagnosis.collect import Collector as Diagnosis
from keras_bn.diagnosis.logger import COMPARED
from keras_bn.tools.statistics import Collector, layers_of

MODELS = {"MobileNetV2": 96, "EfficientNetB0": 80}
BATCH = 32
WIDTHS = (32, 64, 64, 128, 128)
SIZE = 64


def seconds(function):
    """The CPU seconds that a call takes."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def row(name, model, size, samples, rounds):
    """The ratios of one model, each a median over rounds, to `predict` beside it."""
    rng = np.random.default_rng(0)
    x = rng.normal(120.0, 60.0, (samples, size, size, 3)).astype("float32")
    y = rng.integers(0, 10, samples)
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.predict(x, batch_size=BATCH, verbose=0)
    model.fit(x[:BATCH], y[:BATCH], verbose=0)
    once = Collector(model, layers_of(model, False))
    diagnosis, logged = Diagnosis(model), Diagnosis(model)
    quiet = {"batch_size": BATCH, "verbose": 0}

    def recalibrated(x):
        with once:
            once.at_once(x, **quiet)

    following = keras_bn.from_keras(model)
    keras_bn.adapt(following, prior=16)
    following.predict(x[:BATCH], **quiet)
    passes = {
        "fit": lambda: model.fit(x, y, batch_size=BATCH, verbose=0),
        "adapt": lambda: following.predict(x, **quiet),
        "recalibrate": lambda: recalibrated(x),
        "diagnose": lambda: diagnosis.collect((x, y), **quiet),
        "log": lambda: logged.collect(x, compared=COMPARED, **quiet),
        "recalibrate, whole": lambda: keras_bn.recalibrate(model, x, **quiet),
        "diagnose, whole": lambda: keras_bn.diagnose(
            model, (x, y), batch_size=BATCH, verbose=0
        ),
    }
    recalibrated(x[:BATCH])
    diagnosis.collect((x[:BATCH], y[:BATCH]), **quiet)
    logged.collect(x[: 2 * BATCH], compared=BATCH, **quiet)
    ratios = {kind: [] for kind in passes}
    times = []
    for _ in range(rounds):
        for kind, run in passes.items():
            times.append(seconds(lambda: model.predict(x, **quiet)))
            ratios[kind].append(seconds(run) / times[-1])
    medians = {kind: float(np.median(values)) for kind, values in ratios.items()}
    memory.forget_peak()
    before = memory.resident()
    recalibrated(x)
    grown = memory.resident(peak=True) - before
    return {
        "model": name,
        "predict": float(np.median(times)),
        **medians,
        "grown": grown,
    }


def network():
    """A network of convolutions, in Keras."""
    stack = [keras.Input((SIZE, SIZE, 3))]
    for width in WIDTHS:
        stack += [layers.Conv2D(width, 3, use_bias=False)]
        stack += [layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([*stack, layers.GlobalAveragePooling2D(), layers.Dense(10)])


def update_bn(samples, rounds):
    """PyTorch's `update_bn` on the same network, in times of its inference there."""
    import torch

    stack, width = [], 3
    for after in WIDTHS:
        stack += [torch.nn.Conv2d(width, after, 3, bias=False)]
        stack += [torch.nn.BatchNorm2d(after), torch.nn.ReLU()]
        width = after
    stack += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    model = torch.nn.Sequential(*stack, torch.nn.Linear(width, 10))
    batches = torch.randn(samples, 3, SIZE, SIZE).split(BATCH)

    def infer():
        model.eval()
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def update():
        torch.optim.swa_utils.update_bn(batches, model)

    infer()
    update()
    ratios = [seconds(update) / seconds(infer) for _ in range(rounds)]
    return float(np.median(ratios))


def table(rows):
    """The rows as a table in Markdown."""
    kinds = [kind for kind in rows[0] if kind not in ("model", "predict", "grown")]
    head = ["model", "`predict`, CPU s", *kinds, "peak memory of a pass, MiB"]
    return markdown.table(
        head,
        [
            [
                row["model"],
                f"{row['predict']:.2f}",
                *(f"{row[kind]:.2f}" for kind in kinds),
                f"{row['grown'] / 2**20:.0f}",
            ]
            for row in rows
        ],
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    arguments = parser.parse_args(argv)
    how = arguments.samples, arguments.rounds
    rows = [
        row(
            f"{name} {MODELS[name]}×{MODELS[name]}",
            getattr(keras.applications, name)(
                input_shape=(MODELS[name], MODELS[name], 3), weights=None, classes=10
            ),
            MODELS[name],
            *how,
        )
        for name in arguments.models
    ]
    if keras.backend.backend() == "torch":
        rows.append(row("five convolutions", network(), SIZE, *how))
    print(table(rows))
    if keras.backend.backend() == "torch":
        print(f"update_bn, five convolutions: {update_bn(*how):.2f}")


if __name__ == "__main__":
    main()
