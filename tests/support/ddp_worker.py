"""One process of several that train a layer in `DistributedDataParallel`.

Usage: ddp_worker.py RANK PORT FILE. The file has, by case, the shares of the batch.
Each rank writes FILE.RANK.npz: outputs, gradients and statistics by case.
"""

import os
import sys

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import keras_bn


def main(rank, port, path):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    cases, results = np.load(path), {}
    names = {key.split("/")[0] for key in cases}
    for name in sorted(names):
        given = {
            key.split("/")[1]: cases[key]
            for key in cases
            if key.startswith(f"{name}/") and not key.endswith(str(1 - rank))
        }
        for key, value in run(name, given, rank).items():
            results[f"{name}/{key}"] = value
    np.savez(f"{path}.{rank}.npz", **results)
    dist.destroy_process_group()


def run(name, given, rank):
    """The results of a training step with the share of this rank."""
    x = torch.tensor(given[f"x{rank}"], requires_grad=True)
    mask = given.get(f"mask{rank}")
    layer = keras_bn.BatchNormalization(
        dtype="float64", momentum=0.5, synchronized=not name.startswith("local")
    )
    layer.build((None, *x.shape[1:]))
    model = DistributedDataParallel(Model(layer))
    y = model(x, None if mask is None else torch.tensor(mask))
    y.backward(torch.tensor(given[f"upstream{rank}"]))
    results = {
        "y": y,
        "dx": x.grad,
        # `DistributedDataParallel` averages the gradients of weights.
        "d_gamma": 2 * layer.gamma.value.grad,
        "d_beta": 2 * layer.beta.value.grad,
        "moving_mean": layer.moving_mean,
        "moving_variance": layer.moving_variance,
    }
    return {k: keras.ops.convert_to_numpy(v) for k, v in results.items()}


class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask):
        return self.layer(x, training=True, mask=mask)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
