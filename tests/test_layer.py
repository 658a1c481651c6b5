"""The layer's numbers: against two nn.Conv2d in both precisions and formats, against F.pad, and frozen."""

from __future__ import annotations

import io
import time
from itertools import product
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsep import SeparableConv2d, _native
from fastsep._case import LAYOUTS

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-13}


def layer(*args, **options):
    torch.manual_seed(0)
    return SeparableConv2d(*args, **options)


def by_hand(module, x, pads=(0, 0, 0, 0)):
    """Two convolutions; `pads` are left, right, top, bottom."""
    d, p = module.depthwise, module.pointwise
    t = F.conv2d(F.pad(x, pads), d.weight, d.bias, d.stride, 0, d.dilation, d.groups)
    return F.conv2d(t, p.weight, p.bias)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3])
def test_precisions_formats_and_multipliers(m, dtype, layout, frozen):
    module = layer(5, 9, (3, 2), (1, 2), depth_multiplier=m, depthwise_bias=True, dtype=dtype)
    x = torch.randn(3, 5, 10, 9, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        expected, thawed = by_hand(module, x), module(x)
        if frozen:
            assert torch.equal(module.freeze()(x), thawed)
            assert (module._packed is not None) == (_native.core is not None)
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(thawed, expected, rtol=tolerance, atol=tolerance)
    assert thawed.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1), (5, 1)])
def test_same_pads_as_tensorflow_does(kernel, dilation, stride):
    """total = max((ceil(size / stride) - 1) * stride + reach - size, 0), the smaller half in front."""
    module = layer(3, 4, kernel, stride, "same", dilation, dtype=torch.float64)
    for h, w in product(range(1, 8), (6, 7)):
        pads = []
        for size in (w, h):
            total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        x = torch.randn(2, 3, h, w, dtype=torch.float64)
        y = module(x)
        assert y.shape == (2, 4, -(-h // stride), -(-w // stride))
        torch.testing.assert_close(y, by_hand(module, x, pads))


def test_state_dict_is_read_with_weights_only():
    written, file = layer(4, 6, 3, depthwise_bias=True).freeze(), io.BytesIO()
    torch.save(written.state_dict(), file)
    file.seek(0)
    read = SeparableConv2d(4, 6, 3, depthwise_bias=True)
    x = torch.randn(2, 4, 7, 7)
    assert not torch.equal(read(x), written(x))
    read.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(read(x), written(x))


@pytest.mark.skipif(_native.core is None, reason="the native module is missing")
@pytest.mark.parametrize("name", ["depthwise.weight", "pointwise.weight", "depthwise.bias", "pointwise.bias"])
def test_data_written_to_a_frozen_layer_waits(name):
    """For each of the four, as all are packed."""
    frozen = layer(4, 6, 3, depthwise_bias=True).freeze()
    x = torch.randn(2, 4, 7, 7)
    before = frozen(x)
    frozen.get_parameter(name).data.add_(1)
    assert torch.equal(frozen(x), before)
    after = frozen.freeze()(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, by_hand(frozen, x), rtol=1e-4, atol=1e-5)


def test_backward_hooks_of_a_frozen_layer_see_the_gradient():
    """Its weights need none, but its input may."""
    frozen, seen = layer(4, 6, 3).freeze(), []
    frozen.pointwise.register_full_backward_hook(lambda _m, _gi, go: seen.append(go[0]))
    x = torch.randn(2, 4, 7, 7, requires_grad=True)
    frozen(x).square().sum().backward()
    torch.testing.assert_close(seen, [2 * frozen(x).detach()])


@pytest.mark.skipif(_native.core is None, reason="the native module is missing")
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("frozen", [False, True])
def test_small_call_costs_less_than_two_convolutions(frozen):
    """Bare F.conv2d without any module around it; in turns, so that a busy machine slows both."""
    torch.set_num_threads(1)
    module, x = layer(8, 8, 3, padding=1), torch.randn(1, 8, 4, 4)
    if frozen:
        module.freeze()
    dw, pw, b = module.depthwise.weight, module.pointwise.weight, module.pointwise.bias
    functions = module, lambda x: F.conv2d(F.conv2d(x, dw, None, 1, 1, 1, 8), pw, b)

    def seconds(function):
        begin = time.perf_counter()
        for _ in range(50):
            function(x)
        return time.perf_counter() - begin

    with torch.no_grad():
        rounds = [[seconds(function) for function in functions] for _ in range(41)][1:]
    assert median(ours / theirs for ours, theirs in rounds) < 1


def test_children_made_by_hand_may_be_handed_over():
    """As checkpoints of whole modules do it: the layer computes with the children that it is given."""
    module, x = layer(4, 6, 3), torch.randn(2, 4, 7, 7)
    module.depthwise = nn.Conv2d(4, 8, 3, 2, groups=4)
    module.pointwise = nn.Conv2d(8, 5, 1, bias=False)
    torch.testing.assert_close(module(x), by_hand(module, x), rtol=1e-4, atol=1e-5)
    assert (module.in_channels, module.out_channels) == (4, 5)
