"""A small model to optimize, and what its result is held against."""

from __future__ import annotations

import operator

import torch
from networks import randomize_norms
from torch import nn

import fastsep
from fastsep._optimize.layouts import as_channels_last, as_channels_last_or_planar
from fastsep._optimize.series import SeriesStep
from fastsep._optimize.steps import as_contiguous, row_major

CONVERSIONS = as_channels_last, as_channels_last_or_planar, as_contiguous, row_major


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


def nodes_of(optimized):
    """What the optimized forward calls for an image in NCHW, but for conversions from and to that."""
    program = optimized.__dict__["forward"]._plans[0].programs.contiguous
    return [
        node for node in program.graph.nodes if node.op.startswith("call") and node.target not in CONVERSIONS
    ]


def targets_of(optimized):
    return [node.target for node in nodes_of(optimized)]


def steps_of(optimized):
    return [step for target in targets_of(optimized) for step in getattr(target, "links", [target])]


def only_series(optimized):
    (series,) = targets_of(optimized)
    assert isinstance(series, SeriesStep)
    return series


def names_of(steps, attribute):
    return [step.__name__ for step in steps if getattr(step, attribute, False)]


class Excited(nn.Module):
    """Depthwise -> norm -> activation -> squeeze-and-excite -> 1 x 1 -> norm -> sum."""

    def __init__(self, gate=None, product=operator.mul, stride=1, inner=24, out=8, source=lambda x, t: t):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, inner, 1), nn.BatchNorm2d(inner), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.Hardswish())
        self.pool, self.product, self.source = nn.AdaptiveAvgPool2d(1), product, source
        self.squeeze = nn.Sequential(nn.Conv2d(inner, 3, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(3, inner, 1), gate or nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(inner, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def gate(self, t):
        return self.excite(self.squeeze(self.pool(t)))

    def forward(self, x):
        t = self.depthwise(self.expand(x))
        return self.project(self.product(t, self.gate(self.source(x, t))))


class ExcitedResidual(Excited):
    def forward(self, x):
        return x + super().forward(x)
