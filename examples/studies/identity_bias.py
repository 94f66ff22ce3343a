"""Batch normalization makes a residual block nearly the identity in a deep network.

Networks of residual blocks as they are before the first training step: the blocks have
batch normalization, ReLU and a dense layer of He's initialization on the residual
branch, or the last two only. Without normalization a branch is as large as the skip
path, so that the variance doubles in each block. With it, every branch has a variance
of about 1, and the variance on the skip path grows by that in each block: after l
blocks a branch is 1 / sqrt(l) of the skip path, and the deeper the network, the nearer
its blocks are to the identity. Measured on scikit-learn's digits: the mean square of
the skip path and of the branch at each block. (The variance of the paper is over the
draw of the weights; the mean is 0.)

Source: De and Smith, "Batch Normalization Biases Residual Blocks Towards the Identity
Function in Deep Networks", 2020.
"""

from common import claims, data, drawing, gallery  # isort: skip

import itertools
import sys

import keras
import numpy as np

import keras_bn

CLAIM = (
    "With batch normalization on the residual branches, the variance on the skip path "
    "grows by 1 with each block and the branches are scaled by 1 / sqrt(depth); "
    "without, the variance doubles with each block and the scale is the same at all "
    "depths."
)
UNITS, IMAGES = 512, 512
DEPTHS = (10, 20, 50, 100, 200)
KINDS = ("with BN", "without BN")
COLORS = dict(zip(KINDS, drawing.COLORS, strict=False))
TOLERANCE = 0.1


def main(argv=None):
    """Run the example; returns the exit status."""
    example = gallery.Example("identity_bias", __doc__, 4, argv=argv)
    depths = DEPTHS[:3] if example.short else DEPTHS
    images = standardized(data.small_digits().x_train)
    networks = {key: network(*key) for key in itertools.product(depths, KINDS)}
    found = {
        (seed, depth, kind): measure(networks[depth, kind], images, seed)
        for seed, depth, kind in example.each(
            itertools.product(example.seeds, depths, KINDS)
        )
    }
    figures = [
        {
            "seed": seed,
            **{kind: {d: found[seed, d, kind] for d in depths} for kind in KINDS},
        }
        for seed in example.seeds
    ]
    example.table(
        "The last block: variance on the skip path, and size of the branch, median",
        [
            "blocks",
            *(f"{what} {kind}" for what in ("skip", "branch") for kind in KINDS),
        ],
        [
            [
                depth,
                *(f"{np.median(last(figures, k, depth)):.3g}" for k in KINDS),
                *(f"{np.median(scales(figures, k, depth)):.3f}" for k in KINDS),
            ]
            for depth in depths
        ],
    )
    parts = parts_of(figures, depths)
    return example.conclude(CLAIM, parts, figures, draw(figures, depths))


def standardized(images):
    """Rows of pixels with mean 0 and a mean square of 1, as many as are measured."""
    rows = images[:IMAGES].reshape(IMAGES, -1)
    rows = rows - rows.mean(0)
    return rows / np.sqrt(np.mean(rows**2))


def network(depth, kind):
    """A model that gives the skip path ahead of each block, then each branch."""
    inputs = keras.Input((64,))
    x = keras.layers.Dense(UNITS, use_bias=False)(inputs)
    skips, branches = [], []
    for _ in range(depth):
        branch = x
        if kind == "with BN":
            branch = keras_bn.BatchNormalization()(branch)
        branch = keras.layers.ReLU()(branch)
        branch = keras.layers.Dense(UNITS, use_bias=False)(branch)
        skips.append(x)
        branches.append(branch)
        x = keras.layers.Add()([x, branch])
    return keras.Model(inputs, [*skips, *branches])


def measure(model, images, seed):
    """Draw weights by He's initialization, and measure.

    Returns:
        A dict of lists, one number per block: the mean square of the `skip` path ahead
        of the block and of the `branch`, over images and units.
    """
    rng = np.random.default_rng(seed)
    for number, kernel in enumerate(
        w for w in model.trainable_variables if len(w.shape) == 2
    ):
        variance = (2 if number else 1) / kernel.shape[0]
        values = rng.standard_normal(kernel.shape, "float32")
        kernel.assign(values * np.sqrt(variance))
    outputs = model(images, training=True)
    # In float64: without normalization the squares are beyond float32.
    squares = [
        float(np.mean(np.square(keras.ops.convert_to_numpy(x), dtype="float64")))
        for x in outputs
    ]
    depth = len(squares) // 2
    return {"skip": squares[:depth], "branch": squares[depth:]}


def last(figures, kind, depth):
    """The variance on the skip path ahead of the last block, one per seed."""
    return np.array([seed[kind][depth]["skip"][-1] for seed in figures])


def scales(figures, kind, depth):
    """The size of the last block's branch over that of its skip path, one per seed."""
    branches = np.array([seed[kind][depth]["branch"][-1] for seed in figures])
    return np.sqrt(branches / last(figures, kind, depth))


def parts_of(figures, depths):
    deep = depths[-1]
    skips = {k: np.array([one[k][deep]["skip"] for one in figures]) for k in KINDS}
    blocks = np.arange(deep)
    growth = [np.polyfit(blocks, skip, 1)[0] for skip in skips["with BN"]]
    line = [np.corrcoef(blocks, skip)[0, 1] ** 2 for skip in skips["with BN"]]
    doubling = [np.polyfit(blocks, np.log2(x), 1)[0] for x in skips["without BN"]]
    power = {
        kind: np.polyfit(
            np.log(depths), np.log([scales(figures, kind, d) for d in depths]), 1
        )[0]
        for kind in KINDS
    }
    return [
        claims.Part(
            f"with BN, {deep} blocks: growth of the variance per block, off 1",
            np.abs(np.array(growth) - 1),
            below=TOLERANCE,
            form="{:.3f}",
        ),
        claims.Part(
            "with BN: share of it that is linear in the block's index",
            line,
            above=0.99,
            form="{:.4f}",
        ),
        claims.Part(
            "with BN: power of depth that scales the last branch, off -1/2",
            np.abs(power["with BN"] + 0.5),
            below=0.05,
            form="{:.3f}",
        ),
        claims.Part(
            f"with BN, {deep} blocks: last branch times sqrt(depth), off 1",
            np.abs(scales(figures, "with BN", deep) * np.sqrt(deep) - 1),
            below=TOLERANCE,
            form="{:.3f}",
        ),
        claims.Part(
            f"without BN, {deep} blocks: doublings of the variance per block, off 1",
            np.abs(np.array(doubling) - 1),
            below=TOLERANCE,
            form="{:.3f}",
        ),
        claims.Part(
            "without BN: power of depth that scales the last branch, off 0",
            np.abs(power["without BN"]),
            below=0.05,
            form="{:.3f}",
        ),
    ]


def draw(figures, depths):
    """The variance by block, and the size of the branch by depth."""
    deep = depths[-1]
    size = np.median(scales(figures, "with BN", deep))
    figure, axes = drawing.new_figure(
        f"With batch normalization, the last of {deep} residual branches is "
        f"{size:.3f} of its skip path; 1 / sqrt({deep}) = {deep**-0.5:.3f}\n"
        f"(before training, median and range of {len(figures)} seeds)",
        [[*KINDS, "scale"]],
        size=(14, 5),
    )
    blocks = np.arange(1, deep + 1)
    theory = {"with BN": blocks, "without BN": 2.0 ** (blocks - 1)}
    words = {"with BN": "grows by 1 a block", "without BN": "doubles in a block"}
    for kind, color in COLORS.items():
        axis = axes[kind]
        for part, shade in (("skip", color), ("branch", "#888888")):
            values = [seed[kind][deep][part] for seed in figures]
            label = "skip path" if part == "skip" else "branch"
            drawing.band(axis, blocks, values, shade, label, ms=2, lw=1)
        axis.plot(blocks, theory[kind], "k--", lw=1, label=words[kind])
        axis.legend(frameon=False)
        drawing.tidy(axis, f"{kind}: variance by block", "block")
        values = np.stack([scales(figures, kind, depth) for depth in depths], 1)
        drawing.band(axes["scale"], depths, values, color, kind)
    axes["without BN"].set_yscale("log", base=2)
    axis = axes["scale"]
    axis.plot(depths, np.array(depths) ** -0.5, "k--", lw=1, label="1 / sqrt(depth)")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(depths, map(str, depths))
    axis.set_xticks([], minor=True)
    ticks = (0.05, 0.1, 0.2, 0.5, 1)
    axis.set_yticks(ticks, map(str, ticks))
    axis.set_yticks([], minor=True)
    axis.legend(frameon=False)
    drawing.tidy(axis, "Size of the last branch, of its skip path", "blocks")
    return figure


if __name__ == "__main__":
    sys.exit(main())
