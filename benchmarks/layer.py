"""Milliseconds per layer of a training step, shape by shape, beside every peer."""

import argparse
import json

from benchmarks import markdown, peers
from keras_bn import verify
from keras_bn.backends import modes

# (shape, axis)
SHAPES = [
    ((32, 64), -1),
    ((32, 256), -1),
    ((128, 256), -1),
    ((8, 7, 7, 64), -1),
    ((32, 128, 64), -1),
    ((256, 1024), -1),
    ((512, 768), -1),
    ((64, 50, 128), -1),
    ((4, 16, 16, 16, 32), -1),
    ((32, 7, 7, 512), -1),
    ((24, 20, 20, 96), -1),
    ((64, 32, 32, 32), -1),
    ((8192, 256), -1),
    ((32, 28, 28, 128), -1),
    ((32, 128, 28, 28), 1),
    ((16, 56, 56, 64), -1),
    ((16, 112, 112, 64), -1),
]


def measure(
    shape,
    axis=-1,
    mode="graph",
    seconds=5.0,
    training=True,
    backward=True,
    others=True,
    **options,
):
    """One row: who took how long, traced as in `fit` with the batch size unknown.

    For training steps in graph mode, also what the ratio is with all sizes known.
    """
    how = {"mode": mode, "axis": axis, "training": training, "backward": backward}
    chains = peers.functions(shape, **how, others=others, **options)
    timings = verify.per_layer(verify.interleave(chains, seconds), shape)
    row = {
        "shape": shape,
        **how,
        "backward": training and backward,
        **options,
        "ms": {name: timing._asdict() for name, timing in timings.items()},
        "ratio": ratio(timings),
    }
    if row["backward"] and mode == "graph" and not options:
        chains = peers.functions(shape, **how, known=True)
        row["known_ratio"] = ratio(verify.interleave(chains, seconds / 2))
    return row


def ratio(timings):
    """Keras's time over ours."""
    return timings[verify.PEER].median / timings[verify.OURS].median


def name(row):
    """The input of a row, in words."""
    axis = "" if row["axis"] == -1 else f", axis {row['axis']}"
    return f"{tuple(row['shape'])}{axis}"


def table(rows):
    """The rows as a table in Markdown."""
    names = ["Keras", "keras_bn", "fused op", "PyTorch", "Flax"]
    names = [n for n in names if any(n in row["ms"] for row in rows)]
    known = any("known_ratio" in row for row in rows)
    head = ["input", *(f"{n}, ms" for n in names), "Keras / ours"]
    head += ["known sizes, Keras / ours"] if known else []
    lines = []
    for row in rows:
        times = (row["ms"].get(n) for n in names)
        line = [name(row), *("" if t is None else f"{t['median']:.3f}" for t in times)]
        line.append(f"{row['ratio']:.2f}")
        line += [f"{row['known_ratio']:.2f}"] if known else []
        lines.append(line)
    return markdown.table(head, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=modes.MODES, default="graph")
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--dtype", help="a dtype policy, such as mixed_bfloat16")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each shape")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    options = {"dtype": arguments.dtype} if arguments.dtype else {}
    rows = []
    for shape, axis in SHAPES:
        row = measure(
            shape,
            axis,
            arguments.mode,
            arguments.seconds,
            not arguments.inference,
            **options,
        )
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    return rows


if __name__ == "__main__":
    main()
