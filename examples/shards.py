"""Statistics of a data set in shards, on several machines with Ray.

Each worker reads its shards, sends back their statistics, a few kilobytes, and one
process pools them. A worker that is lost costs a shard that is read again, by Ray's own
retry. Meant to be copied: put your model and `read` in.

    python examples/shards.py

starts two workers on this machine, kills one in the middle, and compares the pooled
statistics with those of one pass over the data.
"""

import argparse
import os
import tempfile
from pathlib import Path

import keras
import numpy as np
import ray

import keras_bn

SHARDS, ROWS, BATCH = 6, 96, 32


def read(number):
    """One shard of the data; here it is made, and no shard is like another."""
    rng = np.random.default_rng(number)
    return rng.normal(number, 1.0 + number, (ROWS, 12, 12, 3)).astype("float32")


def build():
    """The model."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.Conv2D(8, 3, use_bias=False),
            keras_bn.BatchNormalization(name="first"),
            keras.layers.ReLU(),
            keras.layers.Conv2D(8, 3, use_bias=False),
            keras_bn.BatchNormalization(name="second"),
        ]
    )


@ray.remote(num_cpus=1, max_retries=3)
def statistics_of(model, number, killed):
    """The statistics of a shard.

    Args:
        model: the model, pickled. Reading it takes an `import keras_bn` before: here,
            the one at the top of this module, which Ray imports in the worker.
        number: of the shard.
        killed: the path of a file that says that a worker was killed.
    """
    if number == SHARDS // 2 and not killed.exists():
        killed.touch()
        os._exit(1)  # as if the machine were lost
    return keras_bn.statistics(model, read(number), batch_size=BATCH, verbose=0)


def main(argv=None):
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    model = build()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        sent = ray.put(model)
        with tempfile.TemporaryDirectory() as folder:
            killed = Path(folder, "killed")
            parts = [statistics_of.remote(sent, i, killed) for i in range(SHARDS)]
            pooled = keras_bn.pooled(ray.get(parts))
            print(f"a worker was killed: {killed.exists()}")
    finally:
        ray.shutdown()
    whole = np.concatenate([read(number) for number in range(SHARDS)])
    expected = keras_bn.statistics(model, whole, batch_size=BATCH, verbose=0)
    difference = max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for path in expected
        for a, b in zip(pooled[path], expected[path], strict=True)
    )
    keras_bn.set_statistics(model, pooled)
    print(f"{SHARDS} shards, {pooled.samples} samples: {difference:.1e} from one pass")
    return 0 if difference < 1e-6 else 1


if __name__ == "__main__":
    raise SystemExit(main())
