"""The settings in which the proof compares the layers, and their random inputs."""

from dataclasses import dataclass
from itertools import product

import keras
from keras import ops

from keras_bn.backends import modes

MEAN = 1.0
SHAPES = [
    ((256, 64), -1),
    ((32, 40, 16), -1),
    ((32, 16, 40), 1),
    ((8, 14, 14, 32), -1),
    ((8, 32, 14, 14), 1),
    ((4, 6, 8, 6, 16), -1),
    ((4, 16, 6, 8, 6), 1),
]
DTYPES = ["float64", "float32", "mixed_float16", "mixed_bfloat16", "float16"]
LARGE_MEANS = [1e3, 1e5]
QUICK = ("float32", MEAN)


@dataclass(frozen=True)
class Case:
    """One setting to compare the layers in.

    Args:
        shape: of the input.
        axis: the channel axis.
        dtype: name of a dtype policy, such as "float32" or "mixed_float16".
        mode: one of `keras_bn.backends.modes.MODES`.
        mean: of the input, whose standard deviation is 1.
    """

    shape: tuple[int, ...]
    axis: int
    dtype: str
    mode: str
    mean: float = MEAN


def cases(quick: bool = False) -> list[Case]:
    """The settings that the proof goes through by default.

    Args:
        quick: all shapes only in float32; other dtypes and large means only with one
            shape.

    Returns:
        Shapes of rank 2 to 5, with the channels last and first, in each dtype; some
        also in float32 with large means; all in each of `modes.MODES`.
    """
    settings = []
    for shape in SHAPES:
        settings += [(shape, dtype, MEAN) for dtype in DTYPES]
        if len(shape[0]) in (2, 4):
            settings += [(shape, "float32", mean) for mean in LARGE_MEANS]
    if quick:
        settings = [s for s in settings if s[0] == SHAPES[0] or s[1:] == QUICK]
    return [
        Case(*shape, dtype, mode, mean)
        for (shape, dtype, mean), mode in product(settings, modes.MODES)
    ]


def draw(case, rng):
    """Random arguments of `judge.reference`, rounded to the layers' dtypes.

    Args:
        case: a `Case`.
        rng: a NumPy generator.

    Returns:
        A dict of arrays of float64.
    """
    policy = keras.DTypePolicy(case.dtype)
    channels = case.shape[case.axis]
    activations = {
        "x": rng.normal(case.mean, 1, case.shape),
        "upstream": rng.normal(size=case.shape),
    }
    weights = {
        "gamma": rng.uniform(0.5, 1.5, channels),
        "beta": rng.normal(size=channels),
        "moving_mean": rng.normal(case.mean, 0.1, channels),
        "moving_variance": rng.uniform(0.5, 2, channels),
    }

    def rounded(arrays, dtype):
        return {
            name: ops.convert_to_numpy(ops.cast(a, dtype)).astype("float64")
            for name, a in arrays.items()
        }

    return {
        **rounded(activations, policy.compute_dtype),
        **rounded(weights, policy.variable_dtype),
    }
