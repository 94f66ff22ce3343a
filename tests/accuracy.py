"""Accuracy under stress: ours, Keras's and PyTorch's error against float64.

    python tests/accuracy.py --write docs/numerics.md

writes the table between the two markers of that page. `tests/layer/test_stress.py`
holds each row to its rule.
"""

import argparse
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import oracle
from support.backend import COMPILED
from support.steps import MODES, Step

import keras_bn

CHANNELS = 8
DRAWS = 6


def normal(mean, std, rows=512):
    return lambda rng: rng.normal(mean, std, (rows, CHANNELS))


ROWS = {
    "mean 0, std 1": normal(0, 1),
    "mean 1e2, std 1": normal(1e2, 1),
    "mean 1e3, std 1": normal(1e3, 1),
    "mean 1e4, std 1": normal(1e4, 1),
    "mean 1e5, std 1": normal(1e5, 1),
    "mean 0, std 1e-3": normal(0, 1e-3),
    "mean 0, std 1e-10": normal(0, 1e-10),
    "mean 1, std 1e-4": normal(1, 1e-4),
    "constant 1e8": normal(1e8, 0),
    "denormal, 1e-40": normal(0, 1e-40),
    "std 1e18": normal(0, 1e18),
    "262,144 elements, mean 0, std 1": normal(0, 1, 2**15),
    "262,144 elements, mean 1e3, std 1": normal(1e3, 1, 2**15),
    "262,144 elements, mean 1e5, std 1": normal(1e5, 1, 2**15),
    "float16, mean 6e4, std 1e2": normal(6e4, 1e2),
    "float16, std 1e-7": normal(0, 1e-7),
}
QUANTITIES = ("y", "dx", "d_gamma", "mean", "variance")


def dtype_of(row):
    return "mixed_float16" if row.startswith("float16") else "float32"


def rounding_unit(row):
    """What one rounding of the largest value of an output costs.

    Sixteen where 32,768 terms are summed: Keras's sums are lucky with 8 channels.
    """
    if dtype_of(row) == "mixed_float16":
        return 2.0**-11
    return 2.0**-19 if "elements" in row else 2.0**-23


def error(got, want):
    """In units of the largest value wanted, or of 1 where that is larger.

    Outputs and gradients live on the scale of gamma and of the upstream gradient,
    which is 1 here: what is far below it is no more than rounding there.
    """
    return float(np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1.0))


def exact(x, upstream):
    one, zero = np.ones(CHANNELS), np.zeros(CHANNELS)
    _, mean, variance = oracle.moments(x, (1,))
    dx, d_gamma, _ = oracle.backward(x, one, (1,), 1e-3, upstream)
    y = oracle.forward(x, one, zero, (1,), 1e-3)
    return {"y": y, "dx": dx, "d_gamma": d_gamma, "mean": mean, "variance": variance}


def of_keras(cls, dtype, mode):
    """A training step of a Keras layer as a function of arrays."""
    layer = cls(dtype=dtype, momentum=0.0)
    layer.build((None, CHANNELS))
    step = Step(layer, mode)

    def run(x, upstream):
        got = step(x, upstream)
        got["mean"], got["variance"] = got["moving_mean"], got["moving_variance"]
        return got

    return run


def of_pytorch(dtype):
    """The same of PyTorch's layer; None where PyTorch is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    half = dtype == "mixed_float16"

    def run(x, upstream):
        layer = torch.nn.BatchNorm1d(CHANNELS, eps=1e-3, momentum=1.0)
        kind = torch.float16 if half else torch.float32
        inputs = torch.tensor(x).to(kind).requires_grad_(True)
        y = layer(inputs)
        y.backward(torch.tensor(upstream).to(y.dtype))
        n = len(x)
        return {
            "y": y.detach().double().numpy(),
            "dx": inputs.grad.double().numpy(),
            "d_gamma": layer.weight.grad.double().numpy(),
            "mean": layer.running_mean.double().numpy(),
            "variance": layer.running_var.double().numpy() * (n - 1) / n,
        }

    return run


def measure(row, modes=MODES):
    """Mean errors over the draws: a dict from who to a dict by quantity."""
    dtype = dtype_of(row)
    kind = "float16" if dtype == "mixed_float16" else "float32"
    runs = {"Keras": of_keras(keras.layers.BatchNormalization, dtype, COMPILED)}
    if pytorch := of_pytorch(dtype):
        runs["PyTorch"] = pytorch
    for mode in modes:
        runs[mode] = of_keras(keras_bn.BatchNormalization, dtype, mode)
    errors = {who: {q: [] for q in QUANTITIES} for who in runs}
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        x = ROWS[row](rng).astype(kind).astype("float64")
        upstream = rng.normal(size=x.shape).astype(kind).astype("float64")
        want = exact(x, upstream)
        for who, run in runs.items():
            got = run(x, upstream)
            for q in QUANTITIES:
                errors[who][q].append(error(got[q], want[q]))
    return {
        who: {q: float(np.mean(values)) for q, values in by.items()}
        for who, by in errors.items()
    }


def peers_best(errors, quantity):
    found = [errors[who][quantity] for who in ("Keras", "PyTorch") if who in errors]
    return np.min([error if np.isfinite(error) else np.inf for error in found])


def line(*cells):
    return f"| {' | '.join(cells)} |"


def table():
    lines = [
        line("input", "error of", "Keras", "PyTorch", *(f"ours, {m}" for m in MODES)),
        line(*["---"] * (4 + len(MODES))),
    ]
    for row in ROWS:
        errors = measure(row)
        for q in QUANTITIES:
            cells = (
                f"{errors[who][q]:.1e}" if who in errors else "not installed"
                for who in ("Keras", "PyTorch", *MODES)
            )
            lines.append(line(row, q, *cells))
        print(row, file=sys.stderr, flush=True)
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page that holds the markers")
    page = parser.parse_args(argv).write
    text = table()
    if page is None:
        print(text)
        return
    start, end = "<!-- accuracy -->", "<!-- /accuracy -->"
    pattern = re.compile(f"{start}.*?{end}", re.S)
    page.write_text(pattern.sub(f"{start}\n{text}\n{end}", page.read_text()))


if __name__ == "__main__":
    main()
