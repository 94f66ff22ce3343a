"""Networks that were trained elsewhere: SpliceAI, through loading and the tools.

Its five networks, of 2019, are inside of a package: pip install --no-deps spliceai

python tests/tools/splice_sites.py [FOLDER]
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

COLUMNS = {
    "norms": "normalizations",
    "loaded": "loaded, Δ",
    "mean": "moving means off, in std: median and largest of the layers",
    "ratio": "moving std / the data's, over the layers",
    "findings": "errors and warnings",
    "folded": "folded",
    "fold": "folded, Δ",
    "export": "exported, Δ",
}
# Letters on both sides that the output leaves out.
_CONTEXT = 10_000
_SHARES = (0.295, 0.205, 0.205, 0.295)  # of A, C, G and T in human DNA


def sequences(count, length):
    """Random DNA as the networks take it: float32 of (count, length, 4)."""
    import numpy as np

    letters = np.random.default_rng(0).choice(4, (count, _CONTEXT + length), p=_SHARES)
    return np.eye(4, dtype="float32")[letters]


def check(file):
    """What the tools make of a file: a dict of figures."""
    import keras
    import numpy as np
    import tensorflow as tf

    import keras_bn

    x = sequences(2, 2000)
    before = keras.saving.load_model(file, compile=False).predict(x, 1, verbose=0)

    def difference(y):
        return float(np.abs(np.asarray(y) - before).max() / before.std())

    model = keras_bn.load_model(file, compile=False)
    report = keras_bn.diagnose(model, x, batch_size=1)
    drifts = [layer.drift for layer in report.record.measured]
    means = np.array([drift.mean for drift in drifts])
    ratios = np.array([drift.ratio for drift in drifts])
    plan = keras_bn.plan_fold(model)
    small = keras_bn.fold(model)
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False)
        loaded = tf.saved_model.load(folder)  # holds the variables
        exported = np.concatenate([loaded.serve(x[:1]), loaded.serve(x[1:])])
    return {
        "norms": len(plan),
        "loaded": difference(model.predict(x, 1, verbose=0)),
        "mean": f"{np.median(means):.2f}, {means.max():.2f}",
        "ratio": f"{ratios.min():.2f} to {ratios.max():.2f}",
        "findings": sum(f.severity != "note" for f in report.findings),
        "folded": sum(fold.into is not None for fold in plan),
        "fold": difference(small.predict(x, 1, verbose=0)),
        "export": difference(exported),
    }


def files_of(folder=None):
    """The files of the networks in a folder; of the package, if it is installed."""
    spec = importlib.util.find_spec("spliceai")
    if folder is None and spec is not None:
        folder = Path(spec.origin).parent / "models"
    return [] if folder is None else sorted(Path(folder).glob("*.h5"))


def holds(result):
    """Whether the figures of a network are as they should be."""
    near = all(result[key] < 1e-4 for key in ("loaded", "fold", "export"))
    return near and result["findings"] == 0 and result["folded"] > 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="of the .h5 files")
    files = files_of(parser.parse_args().folder)
    if not files:
        parser.error("pip install --no-deps spliceai, or give a folder of .h5 files")
    failed = []
    print(f"| network | {' | '.join(COLUMNS.values())} |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for file in files:
        result = check(file)
        cells = [
            f"{value:.0e}" if isinstance(value, float) else str(value)
            for value in result.values()
        ]
        print(f"| {file.stem} | {' | '.join(cells)} |", flush=True)
        if not holds(result):
            failed.append(file.stem)
    print(*failed, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
