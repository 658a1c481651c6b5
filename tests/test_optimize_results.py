"""Results of an optimized model: several of them, and the strides that the model's own forward gives them."""

import copy
import gc
import types
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from optimizing import Block, X, made
from torch import nn
from torch.utils._pytree import tree_leaves

import fastsep
from fastsep import SeparableConv2d


class Stages(nn.Module):
    """A stem and two pairs, of which a subclass makes something."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.first, self.second = Block(8), Block(8)

    def stages(self, x):
        a = F.relu(self.stem(x))
        b = self.first(a)
        return a, b, self.second(b)


IMAGE = torch.randn(2, 3, 20, 22, generator=torch.Generator().manual_seed(0))

RESULTS = {
    "all": lambda a, b, c: (a, b, c),
    "two": lambda a, b, c: (b, c),
    "nested": lambda a, b, c: {"low": a, "rest": [b, (c, c)]},
    "slice": lambda a, b, c: (c[:, :, 1:, 1:], b[:, ::2]),
    "halves": lambda a, b, c: c.chunk(2, 1),
    "permuted": lambda a, b, c: (c.permute(0, 2, 3, 1), b.transpose(2, 3)),
    "behind a permutation": lambda a, b, c: c.permute(0, 2, 3, 1) + 1,
    "contiguous": lambda a, b, c: (c.contiguous(), b),
    "view": lambda a, b, c: c.view(c.shape[0], -1),
    "mean": lambda a, b, c: (c.mean((2, 3), keepdim=True), F.adaptive_avg_pool2d(b, 1), c),
    "pooled": lambda a, b, c: (F.max_pool2d(c, 2), F.interpolate(b, scale_factor=2)),
    "instance norm": lambda a, b, c: F.instance_norm(c),
    "asked": lambda a, b, c: (c, c.stride()),
}


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("results", RESULTS)
def test_results_and_their_strides(results, inputs, weights):
    class Net(Stages):
        def forward(self, x):
            return RESULTS[results](*self.stages(x))

    own = made(Net()).to(memory_format=weights)
    optimized = fastsep.optimize(own)
    x = IMAGE.contiguous(memory_format=inputs)
    with torch.no_grad():
        try:
            expected = own(x)
        except RuntimeError:
            assert results == "view"  # of what is channels-last
            return
        for _ in range(3):
            got = optimized(x)
            for ours, theirs in zip(tree_leaves(got), tree_leaves(expected), strict=True):
                if isinstance(theirs, torch.Tensor):
                    torch.testing.assert_close(
                        ours, theirs, rtol=1e-4, atol=1e-5, check_stride=theirs.numel() > 32
                    )
                else:
                    assert ours == theirs


# A plane of one pixel is dense in both formats; of what it is made, its strides and the next operator tell.
PIXELS = {
    "mean": lambda net, x: x * net.gate(x.mean((2, 3), keepdim=True)).sigmoid(),
    "pooled": lambda net, x: F.hardsigmoid(net.gate(F.adaptive_avg_pool2d(x, 1))) * x,
    "spelled out": lambda net, x: x * (F.relu6(net.gate(x.mean([2, 3], True)) + 3) / 6),
    "viewed": lambda net, x: x * net.linear(x.mean((2, 3))).view(-1, 8, 1, 1).sigmoid(),
    "indexed": lambda net, x: x * net.linear(x.mean((2, 3)))[:, :, None, None],
    "unsqueezed": lambda net, x: x * net.linear(x.mean((2, 3))).unsqueeze(2).unsqueeze(3),
    "concatenated": lambda net, x: torch.cat([x, net.large(x, net.norm(net.pool(x)))], 1)[:, 4:12],
    "concatenated as it is": lambda net, x: torch.cat([x, net.large(x, net.pool(x))], 1)[:, 4:12],
}


@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pixel", PIXELS)
def test_pixels_between(pixel, inputs):
    class Net(Stages):
        def __init__(self):
            super().__init__()
            self.gate, self.linear, self.norm = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.BatchNorm2d(8)
            self.pool, self.last = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1)

        def large(self, x, pixel):
            return F.interpolate(pixel, size=x.shape[-2:], mode="bilinear")

        def forward(self, x):
            return F.relu(self.last(PIXELS[pixel](self, self.stages(x)[2])))

    own = made(Net())
    optimized = fastsep.optimize(own, IMAGE)
    programs = optimized.forward._plans[0].programs
    assert programs.contiguous is not None
    assert programs.channels_last is not None
    x = IMAGE.contiguous(memory_format=inputs)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), own(x), rtol=1e-4, atol=1e-5, check_stride=True)


@pytest.mark.parametrize("size", [(2, 3, 20, 22), (2, 3, 2, 2)])
@pytest.mark.parametrize("writes", [False, True])
def test_a_convolution_that_makes_more_of_a_pixel(size, writes):
    """What it makes of one behind a norm is contiguous, else it is as the input: it depends on the size."""

    class Net(Stages):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
            self.grow = nn.Conv2d(8, 8, (3, 1), padding=1, groups=8)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            if writes:
                x.add_(0)
            return self.last(self.grow(self.norm(self.dense(self.stages(x)[2])))) * 2

    own = made(Net())
    optimized = fastsep.optimize(own)
    for inputs in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(size).contiguous(memory_format=inputs)
        with torch.no_grad():
            torch.testing.assert_close(optimized(x), own(x), rtol=1e-4, atol=1e-5, check_stride=True)


def test_results_that_nobody_reads():
    class Net(Stages):
        def forward(self, x):
            a, b, _ = self.stages(x)
            self.second(a)
            return b

    own = made(Net())
    optimized = fastsep.optimize(own)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(optimized(IMAGE), own(IMAGE), rtol=1e-4, atol=1e-5)


def test_a_dense_convolution_behind_a_write_to_the_input():
    class Net(Stages):
        def forward(self, x):
            x.mul_(2)
            _, b, _ = self.stages(x)
            return self.stem(x).view(len(x), -1), b

    own = made(Net())
    optimized = fastsep.optimize(own)
    with torch.no_grad():
        for _ in range(3):
            for ours, theirs in zip(optimized(IMAGE.clone()), own(IMAGE.clone()), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, check_stride=True)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.3), nn.Dropout2d(0.3)])
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last])
def test_the_same_random_numbers(dropout, inputs):
    class Noisy(Stages):
        def forward(self, x):
            _, b, c = self.stages(x)
            return c + torch.rand_like(c) + F.dropout(b, 0.5, training=True)

    class Dropping(Stages):
        def __init__(self):
            super().__init__()
            self.drop = dropout

        def forward(self, x):
            return self.drop(self.stages(x)[2])

    x = IMAGE.contiguous(memory_format=inputs)
    noisy, dropping = made(Noisy()), made(Dropping()).train()
    for own, optimized in (
        (noisy, fastsep.optimize(noisy)),
        (dropping, fastsep.optimize(dropping, mode="training")),
    ):
        own, optimized = copy.deepcopy(own), copy.deepcopy(optimized)
        for _ in range(3):
            results = []
            for model in (own, optimized):
                torch.manual_seed(5)
                with torch.no_grad():
                    results.append(model(x))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_optimizing_in_inference_mode():
    own = made(Block())
    with torch.inference_mode():
        optimized = fastsep.optimize(own)
        expected = own(X)
        assert len(fastsep.report(optimized).fused) == 1
        torch.testing.assert_close(optimized(X), expected, rtol=1e-4, atol=1e-5)
    assert not any(parameter.is_inference() for parameter in optimized.parameters())
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), expected.clone(), rtol=1e-4, atol=1e-5)


def test_a_warning_where_nothing_is_taken_over():
    class Asks(Block):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, groups=8, padding_mode="reflect", padding=1)

        def forward(self, x):
            return self.conv(x)

    for model, reason in (
        (nn.Conv2d(8, 8, 3), "it has no depthwise convolution"),
        (Only(), "conv: padding_mode of conv is 'reflect'"),
        (Asks(), r"depthwise: the model could not be traced"),
    ):
        with pytest.warns(
            UserWarning, match=rf"could take over nothing of this {type(model).__name__}: {reason}"
        ):
            fastsep.optimize(model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsep.optimize(made(Block()))
        fastsep.optimize(made(Block()), filter_fn=lambda *_: False)


def test_a_warning_of_training():
    optimized, frozen = fastsep.optimize(made(Block())), SeparableConv2d(8, 8, 3).eval().freeze()
    for model, way in (
        (optimized, "revert"),
        (nn.Sequential(frozen), "unfreeze"),
        (nn.Sequential(optimized), None),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train()
            model.train()
            model.eval()
        assert [way in str(warning.message) for warning in caught] == ([True] if way else [])
    assert optimized.train() is optimized
    fastsep.revert(optimized)
    assert "train" not in optimized.__dict__
    assert fastsep.optimize(made(Block()).train(), mode="training").train()


def test_plain_objects_of_a_model_are_left_alone():
    class Keeps(Block):
        def __init__(self):
            super().__init__()
            self.space, self.nested = types.SimpleNamespace(last=None), {"a": {"b": [1]}}

        def forward(self, x):
            y = super().forward(x)
            self.space.last = y
            self.nested["a"]["b"].append(y)
            return y

    class Counts(Block):
        def __init__(self):
            super().__init__()
            self.space = types.SimpleNamespace(calls=0)

        def forward(self, x):
            self.space.calls += 1
            return super().forward(x) * self.space.calls

    with pytest.warns(UserWarning, match="it writes to the module"):
        kept = fastsep.optimize(made(Keeps()))
    assert kept.space.last is None
    assert kept.nested == {"a": {"b": [1]}}
    own = made(Counts())
    with pytest.warns(UserWarning, match="it writes to the module"):
        counted = fastsep.optimize(own)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(counted(X), own(X), rtol=1e-4, atol=1e-5)
            assert kept(X) is kept.space.last


def test_hooks_that_collect_features():
    features = []
    model = made(nn.Sequential(Block(), Block()))
    for block in model:
        block.register_forward_hook(lambda _module, _inputs, output: features.append(output))
    optimized = fastsep.optimize(model)
    assert not any(type(feature) is not torch.Tensor for feature in features)
    for _ in range(3):
        features.clear()
        with torch.no_grad():
            y = optimized(X)
        assert len(features) == 2
        assert features[1] is y


def test_new_weights_leave_nothing_behind():
    optimized = fastsep.optimize(made(Block()))

    def rounds(count):
        for _ in range(count):
            with torch.no_grad():
                optimized.pointwise.weight.mul_(1.001)
                for _ in range(3):
                    optimized(X)
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    rounds(3)
    before, after = rounds(1), rounds(20)
    assert not {name: n - before[name] for name, n in after.items() if n - before[name] >= 15}
