"""The examples, run as their headers say."""

import re

import pytest
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
