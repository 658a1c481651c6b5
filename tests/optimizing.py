"""A small model to optimize, and what its result is held against."""

from __future__ import annotations

import torch
from networks import randomize_norms
from torch import nn

import fastsep


class Block(nn.Module):
    """Depthwise, norm, activation, pointwise, norm, activation, and a residual."""

    def __init__(self, channels=8, between=None, behind=None, **options):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **options)
        self.between = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()) if between is None else between
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.behind = nn.BatchNorm2d(channels) if behind is None else behind

    def forward(self, x):
        return x + self.behind(self.pointwise(self.between(self.depthwise(x))))


X = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(0))


def made(model, seed=0):
    """In eval mode, with other numbers in the norms."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    randomize_norms(model)
    return model.eval()


def check(model, x=X, *, fused=1, **options):
    """Optimizes, holds the result against the model's own, and returns both the copy and the reasons."""
    with torch.no_grad():
        expected = model(x.clone())
    optimized = fastsep.optimize(model, **options)
    report = fastsep.report(optimized)
    with torch.no_grad():
        got = optimized(x.clone())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert got.stride() == expected.stride()
    assert len(report.fused) == fused
    return optimized, [candidate.reason for candidate in report.left]


def settled(model, x=X):
    """The result once the model has seen its new state often enough to work with it."""
    with torch.no_grad():
        results = [model(x) for _ in range(3)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)
    return results[-1]
