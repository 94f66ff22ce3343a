"""Random training steps against the oracle, for as long as it is told to.

python tests/fuzz.py --seconds 120            # a fresh seed, which it prints
python tests/fuzz.py --seed 7 --only 31       # one case again
"""

import argparse
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from support.cases import Case, check
from support.steps import MODES


def draw(seed, index):
    """The case of this index: the same whatever came before it."""
    rng = np.random.default_rng([seed, index])
    shape = tuple(int(n) for n in rng.integers(1, 7, rng.integers(2, 6)))
    axis = int(rng.integers(-len(shape), len(shape)))
    options = {
        "momentum": float(rng.choice([0.0, 0.5, 0.99, 1.0])),
        "epsilon": float(10.0 ** rng.uniform(-6, 0)),
        "unbiased": bool(rng.random() < 0.3),
    }
    if rng.random() < 0.4 and axis % len(shape):
        options["virtual_batch_size"] = int(rng.integers(1, 5))
    mask = float(rng.choice([0.0, 0.2, 0.7, 1.0])) if rng.random() < 0.5 else None
    offset = float(rng.choice([0, -3, 100, 1e4, 1e5]))
    mode = str(rng.choice(MODES, p=[0.6, 0.2, 0.2]))
    return Case(shape, axis, mask, offset, mode, options, int(rng.integers(2**32)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", type=int, default=None, help="one case's index")
    arguments = parser.parse_args(argv)
    seed = time.time_ns() % 2**32 if arguments.seed is None else arguments.seed
    print(f"fuzz: seed {seed}", flush=True)
    end = time.monotonic() + arguments.seconds
    index = arguments.only or 0
    while time.monotonic() < end:
        case = draw(seed, index)
        try:
            check(case)
        except Exception as error:
            print(f"{error}\n{case}\nagain: --seed {seed} --only {index}")
            return 1
        if arguments.only is not None:
            break
        index += 1
    print(f"fuzz: {index} cases hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
