"""The examples, run as their headers say."""

import re

import pytest
import torch
from commands import run


@pytest.mark.slow
def test_digits():
    """Both networks learn, and learn the same."""
    result = run("python examples/digits.py")
    assert result.returncode == 0, result.stderr
    epochs = re.findall(
        r"^ +\d+ +([\d.]+) +([\d.]+)% +[\d.]+ +([\d.]+) +([\d.]+)% +[\d.]+$", result.stdout, re.M
    )
    losses = [(float(fused), float(plain)) for fused, _, plain, _ in epochs]
    assert len(losses) == 12
    assert losses[0][0] == pytest.approx(losses[0][1], rel=0.02)
    assert min(float(epochs[-1][1]), float(epochs[-1][3])) >= 97


def weights(command, file, dtype):
    """What a command of examples/distributed.py arrives at, and what it says."""
    result = run(f"{command} examples/distributed.py --dtype {dtype} --save {file}")
    assert result.returncode == 0, result.stderr
    values = torch.load(file).values()
    return torch.cat([value.double().flatten() for value in values]), result.stdout


def test_distributed(tmp_path):
    """Two processes with half a batch each arrive where one does with the whole.

    In float64 to 12 digits, and in float32 as near to each other as rounding lets one process come to its own
    float64.
    """
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    two_processes = "torchrun --standalone --nproc-per-node 2"
    got, distance = {}, {}
    for dtype in ("float32", "float64"):
        one, said_one = weights("python", tmp_path / f"one_{dtype}.pt", dtype)
        two, said_two = weights(two_processes, tmp_path / f"two_{dtype}.pt", dtype)
        assert said_one.endswith("1 process\n")
        assert said_two.endswith("2 processes\n")
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said_one)]
        assert losses[-1] < losses[0] / 2
        got[dtype], distance[dtype] = one, (one - two).abs().max().item()
    noise = (got["float32"] - got["float64"]).abs().max().item()
    assert distance["float64"] < 1e-12
    assert 0 < distance["float32"] < 4 * noise < 1e-3
