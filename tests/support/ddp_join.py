"""One process of two that train on different numbers of batches, in `join()`.

Usage: ddp_join.py RANK PORT. It prints as JSON, by case, how training ended, after how
many steps, and the moving mean.
"""

import json
import os
import sys
import warnings

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import keras_bn

CASES = {
    "apart": (False, False),
    "apart, ending early": (False, True),
    "synchronized": (True, False),
    "synchronized, ending early": (True, True),
}


def train(rank, synchronized, early):
    keras.utils.set_random_seed(0)
    layer = keras_bn.BatchNormalization(synchronized=synchronized, momentum=0.5)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), layer, keras.layers.Dense(1)]
    )
    whole = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    generator, steps, ended = torch.Generator().manual_seed(rank), 0, "at the end"
    try:
        with whole.join(throw_on_early_termination=early):
            for _ in range(3 + 2 * rank):
                x = torch.randn(6, 3, generator=generator) + rank
                optimizer.zero_grad()
                whole(x, training=True).square().mean().backward()
                optimizer.step()
                steps += 1
    except (ValueError, RuntimeError) as error:
        ended = str(error)
    dist.barrier()
    return ended, steps, keras.ops.convert_to_numpy(layer.moving_mean).tolist()


def main(rank, port):
    warnings.simplefilter("error", FutureWarning)  # of deprecated collectives
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    print(json.dumps({name: train(rank, *how) for name, how in CASES.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
