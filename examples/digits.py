"""Trains a small separable network on scikit-learn's handwritten digits, with fastsep and with plain torch.

    python examples/digits.py [--epochs 12] [--threads 2]

Both networks start from the same weights and see the same batches, so their curves agree but for rounding.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fastsep import SeparableConv2d


def plain(channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, out_channels, 1, bias=False),
    )


def fused(channels: int, out_channels: int, stride: int) -> nn.Module:
    return SeparableConv2d(channels, out_channels, 3, stride, padding=1, bias=False)


def network(separable: Callable[[int, int, int], nn.Module], seed: int = 0) -> nn.Module:
    def block(channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        convolution = separable(channels, out_channels, stride)
        return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        block(32, 64),
        block(64, 64, stride=2),
        block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, images and labels for the test."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    train, test = train_test_split(
        torch.arange(len(y)).numpy(), test_size=0.25, random_state=0, stratify=labels
    )
    return x[train], y[train], x[test], y[test]


def train(model: nn.Module, epochs: int, seed: int = 0) -> Iterator[tuple[float, float, float]]:
    """After each epoch: mean loss, test accuracy, seconds of training."""
    x, y, test_x, test_y = digits()
    shuffle = torch.Generator().manual_seed(seed)
    batches = -(-len(x) // 64)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs * batches)
    for _ in range(epochs):
        model.train()
        total, begin = 0.0, time.perf_counter()
        for batch in torch.randperm(len(x), generator=shuffle).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        seconds = time.perf_counter() - begin
        model.eval()
        with torch.inference_mode():
            accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
        yield total / len(x), accuracy, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print("          fastsep                      torch")
    print("epoch     loss   accuracy  seconds     loss   accuracy  seconds")
    totals = [0.0, 0.0]
    curves = (train(network(separable), arguments.epochs) for separable in (fused, plain))
    for epoch, results in enumerate(zip(*curves, strict=True), 1):
        columns = "     ".join(
            f"{loss:6.4f}   {accuracy:7.2%}  {seconds:6.2f}" for loss, accuracy, seconds in results
        )
        print(f"{epoch:5}     {columns}")
        totals = [total + seconds for total, (_, _, seconds) in zip(totals, results, strict=True)]
    print(f"total                       {totals[0]:5.2f}                         {totals[1]:5.2f}")


if __name__ == "__main__":
    main()
