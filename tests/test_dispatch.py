"""Which kernel runs."""

from __future__ import annotations

import pytest
import torch
from commands import run

from fastsep import _native


def test_every_isa_has_a_kernel_for_every_dtype() -> None:
    kernels = _native.core.kernels()
    assert len(set(kernels)) == len(kernels)
    for isa in _native.core.compiled_isas():
        for dtype in ("f32", "f64"):
            assert f"separable_{dtype}_{isa}" in kernels


def test_best_is_the_first() -> None:
    assert _native.core.isas()[-1] == "scalar"
    assert run(
        "python -c 'from fastsep._native import core; print(core.best_isa())'", FASTSEP_ISA=""
    ).stdout.split() == [_native.core.isas()[0]]


def test_environment_forces_one(isa: str) -> None:
    """And the one that it names has run."""
    program = (
        "import torch, fastsep; from fastsep import _native; "
        "fastsep.SeparableConv2d(4, 4, 3)(torch.randn(1, 4, 5, 5)); print(_native.core.last_isa())"
    )
    result = run(f'python -c "{program}"', FASTSEP_ISA=isa)
    assert result.stdout.split() == [isa], result.stderr


@pytest.mark.parametrize("dtype", [0, 1])
def test_peak_is_plausible(isa: str, dtype: int) -> None:
    """At least one scalar multiply-add a nanosecond, and no more than 64 float64 FMAs a nanosecond."""
    peak = _native.core.fma_peak(isa, dtype, 0.01)
    assert 5e8 < peak < 2e12


def test_memory_bandwidth_is_plausible(threads: None) -> None:
    """More than a hard disk, less than sixteen channels of memory."""
    torch.set_num_threads(1)
    assert 2e8 < _native.core.memory_bandwidth(64 << 20, 0.05) < 2e12
    torch.set_num_threads(2)
    assert 2e8 < _native.core.memory_bandwidth(64 << 20, 0.05) < 2e12


def test_memory_bandwidth_of_too_little() -> None:
    with pytest.raises(ValueError, match="workspace"):
        _native.core.memory_bandwidth(1000, 0.05)
