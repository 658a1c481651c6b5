"""fastsep.optimize: squeeze-and-excite, whose gates are steps of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optimizing import Excited, ExcitedResidual, X, check, made, names_of, only_series, steps_of
from torch import nn

import fastsep
from fastsep import _native
from fastsep._optimize.steps import ExpandedStep

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": nn.Hardsigmoid()},
        {"gate": nn.Identity()},
        {"product": lambda t, gate: gate * t},
        {"product": torch.mul},
        {"product": lambda t, gate: t.mul(gate)},
        {"inner": 19},
    ],
    ids=str,
)
def test_gates(options, channels_last):
    x = X.contiguous(memory_format=torch.channels_last) if channels_last else X
    optimized, (reason,) = check(model := made(ExcitedResidual(**options)), x, fused=0)
    assert reason == "squeeze-and-excite between"
    series = only_series(optimized)
    assert names_of(series.links, "gated") == names_of(series.links, "residual") == ["project_0"]
    assert isinstance(series.links[0], ExpandedStep)
    with torch.no_grad():
        for other in (x[:1], x[:, :, :4, :5], x[:0]):
            torch.testing.assert_close(optimized(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "gated"),
    [
        ({"stride": 2, "out": 12}, True),
        ({"stride": (3, 1)}, True),
        ({"source": lambda x, t: t + 1}, False),  # made of the mean of another
        ({"source": lambda x, t: x.repeat(1, 3, 1, 1)}, False),
        ({"product": lambda t, gate: t * gate + t}, False),
        ({"product": lambda t, gate: t * 2 + gate}, False),
        ({"product": lambda t, gate: F.relu(t * gate)}, False),
        ({"gate": nn.Softmax(1)}, False),
    ],
    ids=str,
)
def test_what_is_a_gate(options, gated):
    optimized, _ = check(made(Excited(**options)), fused=0)
    assert names_of(steps_of(optimized), "gated") == ["project_0"] * gated


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_gates_that_are_not_finite(value):
    """Are factors as any other: infinity times zero is not a number."""
    model = made(Excited(gate=nn.Identity()))
    with torch.no_grad():
        model.excite[0].bias[3] = value
        model.excite[0].weight[3] = 0
        model.depthwise[0].weight[3] = 0
        model.depthwise[0].bias[3] = 0 if value != 0 else torch.inf
    optimized = fastsep.optimize(model, verify=False)
    assert names_of(steps_of(optimized), "gated")
    with torch.no_grad():
        expected, got = model(X), optimized(X)
    assert expected.isnan().all()
    torch.testing.assert_close(got, expected, equal_nan=True)
