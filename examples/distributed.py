"""Trains a small separable network in several processes, each with its share of every batch.

    python examples/distributed.py [--steps 30] [--dtype float32] [--save weights.pt]
    torchrun --standalone --nproc-per-node 2 examples/distributed.py [the same]

DistributedDataParallel averages the gradients of the shares. That is the gradient of the whole batch, so both
commands arrive at the same weights but for the rounding of sums in another order: with the defaults they
differ by less than float32 differs from float64.
"""

import argparse
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsep import DepthwiseConv2d, SeparableConv2d

BATCH, CLASSES = 32, 10


def network() -> nn.Module:
    """Without batch normalisation, whose statistics would be those of a share."""
    torch.manual_seed(0)
    return nn.Sequential(
        SeparableConv2d(3, 16, 3, padding=1, mid_activation="relu", activation="relu6"),
        SeparableConv2d(16, 32, 3, stride=2, padding="same", activation="silu"),
        DepthwiseConv2d(32, 32, 3, padding=1, activation="hardswish"),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, CLASSES),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures of one pattern for each class, the same in every process."""
    patterns = torch.randn(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(step + 1)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return patterns[labels] + torch.randn(BATCH, 3, 16, 16, generator=generator), labels


def train(steps: int, dtype: torch.dtype, rank: int, world_size: int) -> nn.Module:
    module = network().to(dtype)
    model = DistributedDataParallel(module) if world_size > 1 else module
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for step in range(steps):
        x, labels = batch(step)
        share = slice(rank, None, world_size)
        loss = F.cross_entropy(model(x[share].to(dtype)), labels[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if world_size > 1:
            loss = loss.detach()
            dist.all_reduce(loss)
            loss /= world_size
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1:4}   loss {loss.item():.4f}", flush=True)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--save", help="a file for the weights")
    arguments = parser.parse_args()

    several = dist.is_torchelastic_launched()
    if several:
        dist.init_process_group("gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    if BATCH % world_size:
        parser.error(f"the number of processes must divide the batch of {BATCH}, got {world_size}")
    module = train(arguments.steps, getattr(torch, arguments.dtype), rank, world_size)
    if rank == 0:
        print(f"{world_size} processes" if world_size > 1 else "1 process")
        if arguments.save:
            torch.save(module.state_dict(), arguments.save)
    if several:
        # DistributedDataParallel sits in a reference cycle and holds the group: with it alive, gloo's threads
        # are torn down at the exit of the interpreter, which aborts one run in eight.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
