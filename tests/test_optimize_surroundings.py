"""fastsep.optimize: what goes before a pair, behind it and around it."""

from __future__ import annotations

import gc
import operator

import pytest
import torch
import torch.nn.functional as F
from optimizing import Block, X, check, made, only_series, steps_of
from torch import nn

import fastsep
from fastsep import SeparableConv2d, _native
from fastsep._optimize import steps
from fastsep._optimize.series import MeanStep
from fastsep._optimize.steps import ExpandedStep

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


def expanded_steps(optimized):
    return [step for step in steps_of(optimized) if isinstance(step, ExpandedStep)]


def subtract_in_place(x, y):
    x -= y
    return x


def change_before(x, y):
    alias = x
    x += 1
    return alias + y


class Residual(nn.Module):
    """1 x 1 -> norm -> activation -> depthwise -> 1 x 1 -> norm -> sum."""

    def __init__(self, add=lambda x, y: x + y, expand=None, inner=24, between=None, **options):
        super().__init__()
        self.expand = nn.Conv2d(8, inner, 1) if expand is None else expand
        self.norm = nn.Sequential(nn.BatchNorm2d(inner), nn.ReLU6())
        self.between = between or nn.Identity()
        self.depthwise = nn.Conv2d(inner, inner, 3, **{"padding": 1, **options}, groups=inner)
        self.project = nn.Sequential(nn.Hardswish(), nn.Conv2d(inner, 8, 1), nn.BatchNorm2d(8))
        self.add = add

    def forward(self, x):
        return self.add(x, self.project(self.depthwise(self.between(self.norm(self.expand(x))))))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("add", "residual"),
    [
        (lambda x, y: x + y, True),
        (lambda x, y: y + x, True),
        (lambda x, y: torch.add(x, y), True),
        (lambda x, y: operator.iadd(y, x), True),
        (lambda x, y: torch.add(x, y, alpha=2), False),
        (lambda x, y: x * 1 + y, False),
        (lambda x, y: y + y, False),
        (lambda x, y: (y + x) * y, False),
        (lambda x, y: y, False),
    ],
)
def test_inverted_residual(add, residual, channels_last):
    x = X.contiguous(memory_format=torch.channels_last) if channels_last else X
    optimized, _ = check(made(Residual(add)), x)
    (step,) = expanded_steps(optimized)
    assert step.sum_with_input == residual
    (candidate,) = fastsep.report(optimized).fused
    assert candidate.reason == "separable behind expand" + ", with the sum" * residual


@pytest.mark.parametrize("add", [operator.iadd, subtract_in_place, change_before])
def test_an_input_that_is_written_to(add):
    """`x += y` changes the caller's tensor, optimized or not."""
    model = made(Residual(add))
    optimized = fastsep.optimize(model)
    ours, theirs = X.clone(), X.clone()
    with torch.no_grad():
        torch.testing.assert_close(optimized(ours), model(theirs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours, X)
    (step,) = expanded_steps(optimized)
    assert not step.sum_with_input


@pytest.mark.parametrize(
    ("change", "expanded"),
    [
        ({}, True),
        ({"stride": 2}, True),
        ({"padding": 0, "dilation": 2}, True),
        ({"padding": "same"}, True),
        ({"expand": nn.Conv2d(8, 24, 3, padding=1)}, False),  # of a tensor, not of an image
        ({"expand": nn.Conv2d(8, 24, 1, stride=2)}, False),
        ({"expand": nn.Conv2d(8, 24, 1, groups=2)}, False),
        ({"expand": nn.Conv2d(8, 24, 1, padding=1)}, False),
        ({"between": nn.MaxPool2d(1)}, False),
        ({"between": nn.Mish()}, False),
        ({"between": nn.Dropout(0.5)}, True),
    ],
    ids=str,
)
def test_what_goes_before_a_pair(change, expanded):
    optimized, _ = check(made(Residual(lambda x, y: y, **change)))
    assert bool(expanded_steps(optimized)) == expanded


def test_an_expansion_that_others_read_is_left():
    class Twice(Residual):
        def forward(self, x):
            e = self.norm(self.expand(x))
            return self.project(self.depthwise(e)).mean() + e

    optimized, _ = check(made(Twice()))
    assert not expanded_steps(optimized)


def test_an_expansion_that_is_not_finite_is_left():
    model = made(Residual())
    with torch.no_grad():
        model.expand.weight[3, 2] = torch.inf
    optimized, _ = check(model, verify=False)
    assert not expanded_steps(optimized)


def test_a_pair_takes_its_pointwise_half_first():
    """In depthwise, pointwise, depthwise, pointwise the second is no expansion of the third."""
    pairs = [
        layer for _ in range(2) for layer in (nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1))
    ]
    optimized, _ = check(made(nn.Sequential(*pairs)), fused=2)
    assert not expanded_steps(optimized)


def test_an_expansion_before_a_layer():
    layer = SeparableConv2d(20, 8, 3, padding="same", mid_activation="relu", activation="silu")
    optimized, _ = check(made(nn.Sequential(nn.Conv2d(8, 20, 1), nn.GELU(), layer)))
    assert len(expanded_steps(optimized)) == 1


@pytest.mark.parametrize("size", [(2, 3, 33, 34), (1, 3, 5, 4)])
@pytest.mark.parametrize("padding", [0, 1, (1, 0)])
def test_stem(size, padding):
    """A dense convolution on an image, a pair, and what a classifier has behind it: one native call."""
    stem = nn.Conv2d(3, 16, 3, stride=2, padding=padding, bias=False)
    pair = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(24, 10)
    model = made(nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU6(), *pair, *head))
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    optimized, _ = check(model, x)
    series = only_series(optimized)
    assert len(series.links) == 3
    gc.collect()
    with torch.no_grad():
        for other in (x, x[:1], x.double().float(), x[:, :, :4, :4], x[:0]):
            torch.testing.assert_close(optimized(other), model(other), rtol=1e-4, atol=1e-5)
            last = other.contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(optimized(last), model(last), rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError):
            optimized(x.double())
        with pytest.raises(RuntimeError):
            optimized(x[:, :2])
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)


class Stem(nn.Module):
    """A dense convolution on an image and a pair; `others` of the image's readers, behind them."""

    def __init__(self, channels=3, stride=2, others=lambda x, y: y):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, stride=stride, padding=1), nn.ReLU6())
        self.pair = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 24, 1))
        self.others = others

    def forward(self, x):
        return self.others(x, self.pair(self.stem(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_in_nchw_is_taken_as_it_lies(dtype):
    model = made(Stem()).to(dtype)
    optimized = fastsep.optimize(model)
    (step,) = expanded_steps(optimized)
    images = torch.randn(3, 3, 33, 34, generator=torch.Generator().manual_seed(0), dtype=dtype)
    with torch.inference_mode():
        for x in (images, images[:1], images[:0], images[0], images[:, :, 2:20], images[:, :, :1, :1]):
            y = optimized(x)
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
            assert y.stride() == model(x).stride()
            if x.dim() == 4:
                assert torch.equal(y, optimized(x.contiguous(memory_format=torch.channels_last)))
    taken = {problem[-1] for (_, stride), (problem, *_) in step.calls.items() if stride == images.stride()}
    assert taken == {1}
    assert {problem[-1] for (_, stride), (problem, *_) in step.calls.items() if stride[1] == 1} == {0}


@pytest.mark.parametrize(
    "change", [{"stride": 1}, {"channels": 6}, {"others": lambda x, y: y.sum((1, 2, 3)) + x.sum((1, 2, 3))}]
)
def test_other_images_are_converted(change):
    x = torch.randn(2, change.get("channels", 3), 20, 21, generator=torch.Generator().manual_seed(0))
    optimized, _ = check(made(Stem(**change)), x)
    assert not any(step.planar for step in expanded_steps(optimized))


def out_of_memory(*_, **__):
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("advice", ["taken", "refused", "unknown", "no room"])
def test_weights_of_a_network_lie_together(advice, monkeypatch):
    """In one piece of memory on large pages, where the system has them."""
    model = made(
        nn.Sequential(*(Block() for _ in range(3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    )
    apart, _ = check(model, fused=3)
    if advice == "unknown":
        monkeypatch.delattr(steps.mmap, "MADV_HUGEPAGE", raising=False)
    if advice == "refused":
        monkeypatch.setattr(steps.mmap, "MADV_HUGEPAGE", -1, raising=False)
    if advice == "no room":
        monkeypatch.setattr(steps.mmap, "mmap", out_of_memory)
    monkeypatch.setattr(steps, "_LARGE_PAGE", 4096)
    together, _ = check(model, fused=3)
    with torch.no_grad():
        assert torch.equal(apart(X), together(X))
    for optimized in (apart, together):
        packed = [
            getattr(step, "step", step).packed
            for step in steps_of(optimized)
            if not isinstance(step, MeanStep)
        ]
        assert len(packed) == 4
        assert all(weights.data_ptr() % 64 == 0 for weights in packed)
        pieces = {weights.untyped_storage().data_ptr() for weights in packed}
        assert len(pieces) == (1 if optimized is together and advice in ("taken", "refused") else 4)


def test_large_batches_go_through_in_groups(threads):
    """Of as many images as lie in cache; behind the mean the batch is one."""
    pair = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU6()
    head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 5, 1)
    model = made(nn.Sequential(*pair, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)))
    x = torch.randn(5, 8, 31, 31).repeat_interleave(6, 2).repeat_interleave(6, 3)
    check(model, x, fused=2)
    optimized = fastsep.optimize(model[:6].eval())
    with torch.no_grad():
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            one_by_one = torch.cat([optimized(image[None]) for image in x])
            assert torch.equal(optimized(x), one_by_one)


class Head(nn.Module):
    def __init__(self, pool, linear=True):
        super().__init__()
        self.block, self.pool, self.linear = Block(), pool, nn.Linear(8, 5) if linear else nn.Identity()

    def forward(self, x):
        return self.linear(self.pool(self.block(x)))


POOLS = {
    "function": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1),
    "mean": lambda x: x.mean([2, 3]),
    "negative": lambda x: x.mean((-2, -1)),
    "torch_mean": lambda x: torch.mean(x, (2, 3)),
    "kept": lambda x: x.mean((2, 3), keepdim=True).flatten(1),
    "gate": lambda x: (x * F.adaptive_avg_pool2d(x, 1)).mean((2, 3)),
}
OTHER_POOLS = {
    "channels": lambda x: x.mean((1, 2))[:, :8],
    "four": lambda x: F.adaptive_avg_pool2d(x, 2).flatten(2).amax(2),
    "all": lambda x: x.mean((0, 2, 3)),
}


@pytest.mark.parametrize("name", [*POOLS, *OTHER_POOLS])
def test_means(name):
    optimized, _ = check(made(Head((POOLS | OTHER_POOLS)[name])))
    assert any(isinstance(step, MeanStep) for step in steps_of(optimized)) == (name in POOLS)


@pytest.mark.parametrize("size", [(2, 8, 40, 41), (0, 8, 3, 3), (2, 8, 1, 1)])
def test_mean_of_other_planes(size):
    """Large ones are torch's."""
    check(made(Head(POOLS["mean"])), torch.randn(size, generator=torch.Generator().manual_seed(0)))


def test_more_sizes_than_are_remembered():
    """A series that was made for a size holds what its mean over the plane of that size reads."""
    pair = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1)
    model = made(nn.Sequential(*pair, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)))
    optimized = fastsep.optimize(model)
    inputs = [torch.randn(1, 8, height, 7) for height in range(5, 17)]
    with torch.no_grad():
        for x in inputs + inputs:
            torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("channels", [(8, 40), (8, 3)])
def test_lone_pointwise(stride, channels):
    first = nn.Conv2d(*channels, 1, stride=stride, bias=False)
    check(made(nn.Sequential(Block(), nn.ReLU(), first, nn.BatchNorm2d(channels[1]), nn.SiLU())))


def test_linear_on_other_shapes():
    """Of one dimension and of three, and in another dtype's model."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.linear = Block(), nn.Linear(10, 6)

        def forward(self, x):
            y = self.block(x)
            return (
                self.linear(y),
                self.linear(y[0, 0, 0]),
                self.linear(y[0, 0]),
                self.linear(y[0, :, :, 0].t()[:, :8].repeat(1, 2)[:, :10]),
            )

    model = made(Rows())
    optimized = fastsep.optimize(model)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-5)
