"""fastsep.optimize: steps that read more than one tensor, and results that are read more than once."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from optimizing import Excited, ExcitedResidual, X, check, made, names_of, only_series, steps_of, targets_of
from torch import nn

import fastsep
from fastsep import _native, _ops
from fastsep._optimize.series import LinearStep, SeriesStep
from fastsep._optimize.steps import DenseStep, ExpandedStep, ImageStep

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


class Sum(nn.Module):
    """A depthwise convolution, for there must be one, what is to be added to, and a sum."""

    def __init__(self, layers, add=lambda y, x: y + x, between=lambda x: None):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.layers, self.add, self.between = layers, add, between

    def forward(self, x):
        t = torch.sin(self.first(x))
        y = self.layers(t)
        self.between(t)
        return torch.cos(self.add(y, t))


def pointwise():
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU())


def pair(**options):
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, **{"padding": 1, **options}, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1)
    )


@pytest.mark.parametrize(
    ("add", "taken"),
    [
        (lambda y, x: y + x, True),
        (lambda y, x: x + y, True),
        (torch.add, True),
        (operator.iadd, True),
        (lambda y, x: operator.iadd(x, y), False),
        (lambda y, x: torch.add(y, x, alpha=2), False),
        (lambda y, x: y + 1, False),
        (lambda y, x: y + y, False),
        (lambda y, x: y + torch.tan(x), False),  # made behind
        (lambda y, x: y + x.size(1), False),
    ],
)
@pytest.mark.parametrize("layers", [pointwise, pair], ids=["pointwise", "pair"])
def test_residuals(layers, add, taken):
    optimized, _ = check(made(Sum(layers(), add)), fused=int(layers is pair))
    assert bool(names_of(steps_of(optimized), "residual")) == taken


@pytest.mark.parametrize("layers", [pointwise, pair], ids=["pointwise", "pair"])
@pytest.mark.parametrize("size", [(2, 8, 1, 10), (1, 8, 9, 1), (8, 1, 1), ()])
def test_residuals_of_other_shapes(layers, size):
    """Are broadcast, as torch does it."""
    model = made(Sum(layers(), lambda y, x: y + x))
    optimized = fastsep.optimize(model)
    (step,) = (step for step in steps_of(optimized) if getattr(step, "residual", False))
    other = torch.randn(size)
    with torch.no_grad():
        torch.testing.assert_close(step(X, other), step(X, torch.zeros(())) + other)
        # And where the summand is the larger one.
        larger = torch.randn(3, 1, 8, 9, 10)
        assert step(X, larger).shape == (3, 2, 8, 9, 10)


def test_a_number_for_a_residual():
    """A size, or an argument, may be one: it is added to every pixel."""

    class Number(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = pair(), pair()

        def forward(self, x, number):
            size = x.size(1)
            return self.second(self.first(x) + size) + number

    model = made(Number())
    optimized = fastsep.optimize(model)
    assert len(names_of(steps_of(optimized), "residual")) == 2
    with torch.no_grad():
        for number in (X, 3, 0.5):
            torch.testing.assert_close(optimized(X, number), model(X, number), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(2),
        lambda t: t.view(t.shape[0], -1).mul_(2),
        lambda t: t[:, 1:].mul_(2),
        lambda t: torch.mul(t, 2, out=t),
    ],
)
def test_residuals_that_are_written_to(write):
    optimized, _ = check(made(Sum(pointwise(), between=write)), fused=0)
    assert not names_of(steps_of(optimized), "residual")


def test_sums_that_are_written_to():
    """One step's sum, which another adds, is another by then."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = pair(), pair(), pair()

        def forward(self, x):
            x = torch.sin(x)
            y = self.first(x) + x
            z = self.second(x)
            y.mul_(2)
            return self.third(z + y)

    optimized, _ = check(made(Written()), fused=3)
    assert len(names_of(steps_of(optimized), "residual")) == 1


def test_operands_that_are_negative_views():
    """Of such a tensor other numbers lie in memory than it has."""
    with torch.no_grad():
        optimized = fastsep.optimize(made(Excited(product=torch.mul, out=24)))
        (step,) = (step for step in steps_of(optimized) if getattr(step, "gated", False))
        x, gate = torch.randn(2, 24, 5, 6).to(memory_format=torch.channels_last), torch.randn(2, 24, 1, 1)
        torch.testing.assert_close(step(x, torch._neg_view(-gate)), step(x, gate))
        torch.testing.assert_close(step(torch._neg_view(-x), gate), step(x, gate))
        optimized = fastsep.optimize(made(Sum(pointwise())))
        (step,) = (step for step in steps_of(optimized) if getattr(step, "residual", False))
        x, y = (torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last) for _ in range(2))
        torch.testing.assert_close(step(x, torch._neg_view(-y)), step(x, y))
        series = only_series(fastsep.optimize(made(ExcitedResidual())))
        torch.testing.assert_close(series(torch._neg_view(-x)), series(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_residuals_of_planes_of_one_row(stride):
    """Behind a stride the sum is a broadcast one for two rows, and no sum at all for more."""
    layers = pair(stride=(stride, 1))
    model = made(Sum(layers))
    optimized = fastsep.optimize(model)
    x = X[:, :, :2]
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)
        if stride == 2:
            with pytest.raises(RuntimeError):
                optimized(X)


class Branches(nn.Module):
    """Results that are read more than once and in another order, two inputs, and three outputs."""

    def __init__(self):
        super().__init__()
        self.pairs = nn.ModuleList(pair() for _ in range(4))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.Hardswish())

    def forward(self, x, y):
        a, b = self.pairs[0](x), self.pairs[1](y)
        c = self.pairs[2](a) + b
        d = self.pairs[3](b) + a
        return self.head(d), c, a


def test_branches(threads):
    model = made(Branches())
    optimized = fastsep.optimize(model)
    series = [target for target in targets_of(optimized) if isinstance(target, SeriesStep)]
    assert len(series) == 1
    assert len(series[0].links) == 6
    x, y = X, X.flip(0)
    with torch.no_grad():
        expected, first = model(x, y), optimized(x, y)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = optimized(x, y)
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))
        with torch.profiler.profile() as profile:
            again = optimized(x, y)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    names = [event.key for event in profile.key_averages()]
    assert sum(name.startswith("fastsep: ") for name in names) >= 6


def test_large_batches_of_branches(threads):
    """In groups of images: a second input and a summand are read where the group is."""
    model = made(Branches())
    optimized = fastsep.optimize(model)
    x = torch.randn(5, 8, 31, 31).repeat_interleave(6, 2).repeat_interleave(6, 3)
    y = x.flip(0).contiguous()
    with torch.no_grad():
        for count in (1, 2):
            torch.set_num_threads(count)
            images = [optimized(a[None], b[None]) for a, b in zip(x, y, strict=True)]
            for whole, parts in zip(optimized(x, y), zip(*images, strict=True), strict=True):
                assert torch.equal(whole, torch.cat(parts))


def test_a_series_goes_on_behind_a_step_without_a_kernel():
    """A plane wider than a sum may be long is torch's; what goes before and behind it is one call each."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)
    model = made(nn.Sequential(pair(), pair(), *head))
    x = torch.randn(2, 8, 3, 1030)
    optimized, _ = check(model, x, fused=2)
    series = only_series(optimized)
    assert len(series.links) == 5
    assert [part.end for part in series.parts.values()] == [2, 2, 5]
    assert [part.series is None for part in series.parts.values()] == [False, True, False]


def test_a_series_that_is_reported(monkeypatch):
    """With FASTSEP_VERBOSE each step is called by itself, and gates and sums are torch's."""
    model = made(Excited())
    optimized = fastsep.optimize(model)
    with torch.no_grad():
        expected = optimized(X)
        monkeypatch.setattr(_ops, "VERBOSE", True)
        torch.testing.assert_close(optimized(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "size", [(1, 8, 33, 41), (2, 8, 112, 112), (1, 8, 1024, 1), (1, 8, 1, 1024), (1, 8, 1025, 2)]
)
def test_means_of_large_planes(size):
    """In two sums, of which no one has more than a thousand terms: as exact as torch's."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    model = made(nn.Sequential(pair(), *head))
    x = torch.randn(size) + 1
    optimized, _ = check(model, x)
    assert [part.end for part in only_series(optimized).parts.values()] == [3]


@pytest.mark.parametrize(
    "activation", [nn.Hardswish(), nn.ReLU(), nn.GELU(), nn.Dropout(), nn.Mish()], ids=str
)
def test_linear_with_an_activation(activation):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), activation, nn.Dropout(), nn.Linear(12, 5)
    optimized, _ = check(made(nn.Sequential(pair(), *head)))
    linear = [step for step in steps_of(optimized) if isinstance(step, LinearStep)]
    assert len(linear) == 2
    assert (len(targets_of(optimized)) == 1) != isinstance(activation, nn.Mish)


def test_linear_with_an_activation_on_other_shapes():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.linear = pair(), nn.Linear(10, 6)

        def forward(self, x):
            return F.silu(self.linear(self.pair(x)))

    check(made(Rows()))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same"},
        {"kernel_size": 7, "stride": 2, "padding": 3},
        {"kernel_size": (2, 5), "stride": (1, 3), "padding": (0, 2)},
        {"kernel_size": 4, "stride": 4, "padding": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_image_convolutions(options, channels):
    """The first convolution of a network with anything behind."""
    first = nn.Conv2d(channels, 17, **{"kernel_size": 3, **options}, bias=False)
    layers = first, nn.BatchNorm2d(17), nn.Hardswish(), nn.MaxPool2d(2)
    model = made(nn.Sequential(*layers, nn.Conv2d(17, 17, 3, padding=1, groups=17), nn.AvgPool2d(2)))
    optimized, _ = check(model, torch.randn(2, channels, 33, 30), fused=0)
    kinds = [type(step) for step in steps_of(optimized)]
    assert (ImageStep in kinds) == (channels <= 4)
    assert (DenseStep in kinds) == (channels > 4 and options["padding"] != "same")


def test_an_image_convolution_that_is_not_finite():
    """Beyond the image are zeros, and zero times infinity would not be zero: it stays torch's."""
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), pair()
    model = made(nn.Sequential(*layers))
    with torch.no_grad():
        model[0].weight[3, 2] = torch.inf
    optimized = fastsep.optimize(model, verify=False)
    assert DenseStep in [type(step) for step in steps_of(optimized)]
    x = torch.rand(1, 3, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x), equal_nan=True)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"padding": 1}, True),
        ({"kernel_size": 5, "stride": 2, "padding": 2}, True),
        ({"dilation": 2, "padding": "same"}, True),
        ({"padding": 1, "bias": False}, True),
        ({"out_channels": 40, "padding": 1}, False),  # a depth multiplier
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.ReLU6(), nn.Identity()], ids=str)
def test_an_expansion_before_a_lone_depthwise(options, taken, activation):
    depthwise = nn.Conv2d(20, **{"out_channels": 20, "kernel_size": 3, "groups": 20, **options})
    behind = nn.BatchNorm2d(depthwise.out_channels), activation, nn.AvgPool2d(2)
    model = made(nn.Sequential(nn.Conv2d(8, 20, 1), nn.BatchNorm2d(20), activation, depthwise, *behind))
    optimized = fastsep.optimize(model)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-5)
    (expanded,) = [step for step in steps_of(optimized) if isinstance(step, ExpandedStep)] or [None]
    assert (expanded is not None) == taken


def test_native_operands():
    """Of a lone call: a gate and a residual by their addresses, and what a problem refuses."""
    core = _native.core
    plain = 2, 8, 5, 4, 8, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0
    for index, value in ((6, 3), (5, 2), (17, 0), (4, 0)):
        problem = (*plain[:index], value, *plain[index + 1 :], 0, 1)
        with pytest.raises(ValueError, match="a gate needs channels-last, one filter per channel"):
            core.packed_bytes(problem, "")
    with pytest.raises(ValueError, match="20 fields, 22 with a residual and a gate, or 33"):
        core.packed_bytes((*plain, 0), "")
    weight, ones = torch.randn(8, 8), torch.ones(8)
    packed = torch.empty(core.packed_bytes(plain, "") + 63, dtype=torch.uint8)
    packed = packed[-packed.data_ptr() % 64 :]
    core.pack(plain, "", ones.data_ptr(), 0, weight.data_ptr(), 0, packed.data_ptr(), packed.numel())
    x, residual = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4, 8)
    gate, y = torch.randn(2, 1, 1, 8), torch.empty(2, 5, 4, 8)
    at = packed.data_ptr(), packed.numel(), y.data_ptr()
    core.forward_packed((*plain, 1, 1), "", x.data_ptr(), *at, gate.data_ptr(), residual.data_ptr())
    torch.testing.assert_close(y, (x * gate) @ weight.T + residual)
    core.forward_packed((*plain, 1, 0), "", x.data_ptr(), *at)
    torch.testing.assert_close(y, x @ weight.T + x)
    with pytest.raises(ValueError, match="a gate needs"):
        core.forward_packed((*plain, 0, 1), "", x.data_ptr(), *at)


def test_series_refuses_what_does_not_fit():
    series = _native.core.Series
    problem = 1, 8, 5, 5, 8, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0
    other = (1, 8, 5, 4, *problem[4:])
    gated = (*problem[:6], 1, 1, *problem[8:12], 0, 0, 0, 0, *problem[16:], 0, 1)
    first = problem, 64, 10, 0, -1, -1
    with pytest.raises(ValueError, match="call 1 takes 640 bytes, but value 1 has 800"):
        series([first, (other, 64, 10, 1, -1, -1)], 1, [2])
    with pytest.raises(ValueError, match="call 1 takes 32 bytes, but value 1 has 800"):
        series([first, (gated, 64, 10, 0, 1, -1)], 1, [2])
    with pytest.raises(ValueError, match="call 1 takes 640 bytes, but value 0 has 800"):
        series([first, (other, 64, 10, 0, -1, -1)], 1, [2])
    with pytest.raises(ValueError, match="call 0 reads value 1, expected one of the 1 before it"):
        series([(problem, 64, 10, 1, -1, -1)], 1, [1])
    for operands, what in (((0, -1, -1), gated), ((0, 0, -1), problem), ((0, -1, 0), problem)):
        with pytest.raises(ValueError, match="a gate or residual that its problem has not"):
            series([(what, 64, 10, *operands)], 1, [1])
    with pytest.raises(ValueError, match="calls is empty"):
        series([], 1, [1])
    with pytest.raises(ValueError, match="inputs is 0"):
        series([first], 0, [1])
    with pytest.raises(ValueError, match="outputs is empty"):
        series([first], 1, [])
    with pytest.raises(ValueError, match="outputs has value 0, which is no call's result"):
        series([first], 1, [0])
    made_one = series([first], 1, [1])
    with pytest.raises(ValueError, match="packed"):
        made_one.run([64], [64])
    with pytest.raises(ValueError, match="2 and 1 addresses, expected 1 and 1"):
        made_one.run([64, 64], [64])
