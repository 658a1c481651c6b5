"""What the field's tools do with a convolution, they do with the layers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from fastsep import DepthwiseConv2d, SeparableConv2d

X = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(0))


def layers():
    torch.manual_seed(0)
    options = {"stride": 2, "padding": 1}
    return [
        SeparableConv2d(8, 4, 3, mid_activation="relu", **options),
        SeparableConv2d(8, 4, 3, padding="same", stride=2).freeze(),
        DepthwiseConv2d(8, 16, 3, activation="relu6", **options),
    ]


@pytest.mark.parametrize("number", range(3))
def test_functionalize(number):
    layer = layers()[number]
    torch.testing.assert_close(torch.func.functionalize(layer)(X), layer(X))
    gradient = torch.func.grad(lambda x: layer(x).sum())
    torch.testing.assert_close(torch.func.functionalize(gradient)(X), gradient(X))


@pytest.mark.parametrize("number", range(3))
def test_scripting_is_refused_in_a_sentence(number):
    layer = layers()[number]
    for module in (layer, nn.Sequential(layer)):
        with pytest.raises(
            RuntimeError, match=r"^\w+ cannot be scripted: use torch.jit.trace, torch.export or"
        ):
            torch.jit.script(module)
    layer(X)


def test_a_norm_behind_an_activation_is_not_folded():
    norm = nn.BatchNorm2d(16).eval()
    with pytest.raises(RuntimeError, match=r"conv must have no activation .* got 'relu6'"):
        fuse_conv_bn_eval(layers()[2].eval(), norm)
    plain = DepthwiseConv2d(8, 16, 3).eval()
    norm.running_mean.normal_()
    torch.testing.assert_close(fuse_conv_bn_eval(plain, norm)(X), norm(plain(X)), rtol=1e-4, atol=1e-5)


def test_subclasses_of_weights():
    class Other(torch.Tensor):
        pass

    for layer in layers():
        expected = layer(X)
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(module.weight.detach().as_subclass(Other))
        torch.testing.assert_close(layer(X).as_subclass(torch.Tensor), expected)


def test_numbers_of_numpy():
    eight, three, one = np.int64(8), np.int32(3), np.int64(1)
    layer = SeparableConv2d(
        eight, np.int64(4), three, stride=one, padding=one, depth_multiplier=one, groups=eight
    )
    assert layer(X).shape == (2, 4, 9, 10)
    assert (type(layer.in_channels), type(layer.out_channels)) == (int, int)
    assert DepthwiseConv2d(eight, eight, (three, three), groups=eight)(X).shape == (2, 8, 7, 8)


def test_groups():
    assert SeparableConv2d(8, 4, 3, groups=8).groups == 8
    for groups in (1, 4, "8"):
        with pytest.raises(ValueError, match="groups must be None or in_channels, 8, got"):
            SeparableConv2d(8, 4, 3, groups=groups)


def test_attributes_of_a_convolution():
    layer = SeparableConv2d(8, 4, (3, 5), (1, 2), ((0, 1), (2, 2)), (2, 1))
    assert layer.kernel_size == (3, 5)
    assert layer.stride == (1, 2)
    assert layer.padding == ((0, 1), (2, 2))
    assert layer.dilation == (2, 1)
    assert layer.groups == layer.in_channels == 8
    assert layer.bias is layer.pointwise.bias
    assert SeparableConv2d(8, 4, 3, padding=1).padding == (1, 1)
    assert SeparableConv2d(8, 4, 3, 2, "same").padding == "same"
    assert SeparableConv2d(8, 4, 3, bias=False).bias is None
    assert not hasattr(layer, "weight")  # there are two


def test_operations_that_torch_counts():
    for layer in layers():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = layer(X)
        conv = layer if isinstance(layer, DepthwiseConv2d) else layer.depthwise
        terms = 9 * conv.out_channels + (0 if conv is layer else conv.out_channels * layer.out_channels)
        assert counter.get_total_flops() == 2 * len(y) * y.shape[2] * y.shape[3] * terms


def test_operations_that_hooks_count():
    """As the tools do that put a hook on each module: the children are called then."""
    layer, counted = layers()[0], {}

    def count(name):
        def hook(module, _inputs, output):
            counted[name] = output.numel() * module.weight[0].numel()

        return hook

    for name, child in layer.named_children():
        child.register_forward_hook(count(name))
    y = layer(X)
    pixels = len(y) * y.shape[2] * y.shape[3]
    assert counted == {"depthwise": pixels * 8 * 9, "pointwise": pixels * 4 * 8}
