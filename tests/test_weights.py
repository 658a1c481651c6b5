"""load_from(), with the modules that the weights come from, or with their names."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import randomize_norms
from torch import nn

from fastsep import SeparableConv2d, load_from
from fastsep._networks import import_library

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))
GENERATOR = np.random.default_rng(0)


def keras_arrays(multiplier=2):
    shapes = (3, 5, 6, multiplier), (1, 1, 6 * multiplier, 4), (4,)
    return [GENERATOR.standard_normal(shape).astype("float32") for shape in shapes]


def keras_formula(x, depthwise, pointwise, bias):
    """SeparableConv2D with padding="valid" on [N, H, W, C], each sum written out over whole arrays."""
    kh, kw, channels, multiplier = depthwise.shape
    height, width = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    taps = sum(
        x[:, r : r + height, s : s + width, :, None] * depthwise[r, s] for r in range(kh) for s in range(kw)
    )
    inner = taps.reshape(*taps.shape[:3], channels * multiplier)
    return inner @ pointwise[0, 0] + bias


@pytest.mark.parametrize("multiplier", [1, 3])
def test_keras(multiplier):
    arrays = keras_arrays(multiplier)
    expected = keras_formula(X.permute(0, 2, 3, 1).numpy(), *arrays)
    names = [
        ("depthwise_kernel", "pointwise_kernel", "bias"),
        (
            "separable_conv2d_3/depthwise_kernel:0",
            "separable_conv2d_3/pointwise_kernel:0",
            "separable_conv2d_3/bias:0",
        ),
    ]
    for source in (arrays, *(dict(zip(n, arrays, strict=True)) for n in names)):
        layer = load_from(SeparableConv2d(6, 4, (3, 5), depth_multiplier=multiplier), source)
        torch.testing.assert_close(
            layer(X).detach().permute(0, 2, 3, 1).numpy(), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("prefix", ["a/first", "a/first/"])
def test_keras_under_a_prefix(prefix):
    first, second = keras_arrays(), keras_arrays()
    names = "depthwise_kernel:0", "pointwise_kernel:0", "bias:0"
    source = {
        f"a/{layer}/{name}": value
        for layer, arrays in (("first", first), ("second", second))
        for name, value in zip(names, arrays, strict=True)
    }
    layer = SeparableConv2d(6, 4, (3, 5), depth_multiplier=2)
    weight = load_from(layer, source, prefix).pointwise.weight
    torch.testing.assert_close(weight.detach()[..., 0, 0].T.numpy(), first[1][0, 0])


def test_arrays_of_every_kind():
    arrays = keras_arrays()
    layer = SeparableConv2d(6, 4, (3, 5), depth_multiplier=2)
    expected = load_from(layer, arrays)(X)
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    reversed_twice = [a[::-1].copy()[::-1] for a in arrays]
    for same in (tensors, reversed_twice):
        torch.testing.assert_close(load_from(layer, same)(X), expected)
    load_from(layer, [tensor.bfloat16() for tensor in tensors])
    torch.testing.assert_close(layer(X), expected, rtol=0.05, atol=0.2)
    state = {name: value.numpy().copy() for name, value in STATE.items()}
    for source in (state, {name: torch.tensor(value, requires_grad=True) for name, value in state.items()}):
        torch.testing.assert_close(
            load_from(SeparableConv2d(6, 4, 3), source).depthwise.weight,
            STATE["depthwise.weight"],
            check_device=True,
        )


def test_keras_without_bias():
    layer = load_from(SeparableConv2d(6, 4, (3, 5), depth_multiplier=2, bias=False), keras_arrays()[:2])
    assert layer.pointwise.bias is None


def test_timm():
    theirs = import_library("timm").layers.SeparableConv2d(6, 4, 3, bias=True)
    ours = load_from(SeparableConv2d(6, 4, 3, padding=1), theirs)
    torch.testing.assert_close(ours(X), theirs(X))


@pytest.mark.parametrize("names", ["timm", "timm_block"])
def test_timm_with_norms(names):
    timm = import_library("timm")
    torch.manual_seed(0)
    if names == "timm":
        theirs = timm.models._efficientnet_blocks.DepthwiseSeparableConv(6, 6, noskip=True)
    else:
        theirs = importlib.import_module("timm.models.xception_aligned").SeparableConv2d(6, 6, 3, padding=1)
    randomize_norms(theirs.eval())
    mid = "relu"
    ours = SeparableConv2d(6, 6, 3, padding=1, depthwise_bias=True, mid_activation=mid)
    if names == "timm_block":
        ours.activation = "relu"
    torch.testing.assert_close(load_from(ours, theirs)(X), theirs(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "blocks.0"])
def test_a_modules_norms_have_their_own_eps(prefix):
    """MobileNetV3's and EfficientNet's is 1e-3, which counts where the variance is small."""
    theirs = (
        import_library("timm").models._efficientnet_blocks.DepthwiseSeparableConv(6, 6, noskip=True).eval()
    )
    for norm, eps in ((theirs.bn1, 1e-3), (theirs.bn2, 3e-3)):
        norm.eps = eps
        norm.running_var.fill_(0.01)
    source = nn.ModuleDict({"blocks": nn.Sequential(theirs)}) if prefix else theirs
    ours = SeparableConv2d(6, 6, 3, padding=1, depthwise_bias=True, mid_activation="relu")
    torch.testing.assert_close(load_from(ours, source, prefix)(X), theirs(X), rtol=1e-5, atol=1e-5)
    for eps in (1e-3, 3e-3):  # one that is given is for all, whatever the source
        theirs.bn1.eps = theirs.bn2.eps = eps
        for same in (source, source.state_dict()):
            theirs.bn1.eps = theirs.bn2.eps = 1.0
            load_from(ours, same, prefix, norm_eps=eps)
            theirs.bn1.eps = theirs.bn2.eps = eps
            torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-5)


def test_timm_legacy_xception():
    import_library("timm")
    theirs = importlib.import_module("timm.models.xception").SeparableConv2d(6, 4, 3, padding=1)
    torch.testing.assert_close(
        load_from(SeparableConv2d(6, 4, 3, padding=1, bias=False), theirs)(X), theirs(X)
    )


def test_segmentation_models_pytorch():
    """Its SeparableConv2d is an nn.Sequential."""
    theirs = nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False), nn.Conv2d(6, 4, 1)
    )
    ours = load_from(SeparableConv2d(6, 4, 3, padding=2, dilation=2), theirs)
    torch.testing.assert_close(ours(X), theirs(X))


class Normed(nn.Module):
    """Two convolutions with norms by any names: mmcv's and detectron2's modules in their shape."""

    def __init__(self, halves, conv, norm, *, bias=False):
        super().__init__()
        self.names = []
        for half, (inputs, kernel, groups) in zip(halves, ((6, 3, 6), (6, 1, 1)), strict=True):
            block = nn.Conv2d(inputs, 6, kernel, padding=kernel // 2, groups=groups, bias=bias)
            if conv:
                block = nn.ModuleDict({conv: block})
            block.add_module(norm, nn.BatchNorm2d(6))
            self.add_module(half, block)
        self.halves, self.conv, self.norm = halves, conv, norm

    def forward(self, x):
        for half in self.halves:
            block = getattr(self, half)
            if self.conv:
                x = block[self.conv](x)
            else:
                x = F.conv2d(x, block.weight, block.bias, 1, block.padding, 1, block.groups)
            x = (block[self.norm] if self.conv else getattr(block, self.norm))(x).relu()
        return x


@pytest.mark.parametrize(
    ("halves", "conv", "norm"),
    [(("depthwise_conv", "pointwise_conv"), "conv", "bn"), (("depthwise", "pointwise"), "", "norm")],
    ids=["mmcv", "detectron2"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_mmcv_and_detectron2(halves, conv, norm, bias, tmp_path):
    torch.manual_seed(0)
    theirs = Normed(halves, conv, norm, bias=bias)
    randomize_norms(theirs.eval())
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {f"head.{k}": v for k, v in theirs.state_dict().items()}, "epoch": 3}, path)
    for prefix in ("head", "head."):
        ours = SeparableConv2d(
            6, 6, 3, padding=1, depthwise_bias=True, mid_activation="relu", activation="relu"
        )
        torch.testing.assert_close(load_from(ours, path, prefix)(X), theirs(X), rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_is_packed_again():
    source = SeparableConv2d(6, 4, 3)
    layer = load_from(SeparableConv2d(6, 4, 3).freeze(), source)
    torch.testing.assert_close(layer(X), source(X).detach())


class Danger:
    def __reduce__(self):
        return print, ("ran",)


def test_checkpoints_run_no_code(tmp_path, capsys):
    torch.save({"state_dict": Danger()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_from(SeparableConv2d(6, 4, 3), tmp_path / "bad.pt")
    assert "ran" not in capsys.readouterr().out


STATE = SeparableConv2d(6, 4, 3).state_dict()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "source must be a state dict, .* got int"),
        ([1.0], ValueError, "source must have two or three arrays, as Keras' layer does, got 1"),
        ({}, ValueError, "prefix must be that of a name in the source, got ''"),
        (
            {"depth.weight": STATE["depthwise.weight"]},
            ValueError,
            "source must name its depthwise convolution",
        ),
        (
            {k: v for k, v in STATE.items() if "bias" not in k},
            ValueError,
            "source must have a pointwise.bias for the layer",
        ),
        (
            STATE | {"depthwise.bias": torch.ones(6)},
            ValueError,
            "layer must have a depthwise.bias like the source",
        ),
        (STATE | {"se.fc.weight": torch.ones(6)}, ValueError, "and its norms only, got se.fc.weight"),
        (
            STATE | {"pointwise.weight": torch.ones(4, 7, 1, 1)},
            ValueError,
            r"pointwise.weight must be \[4, 6, 1, 1\] as in the layer, got \[4, 7, 1, 1\]",
        ),
        (
            STATE | {"pointwise.norm.running_mean": torch.ones(4)},
            ValueError,
            "source must have a running_var",
        ),
        ({"depthwise_kernel": np.ones((3, 3, 6, 1))}, ValueError, "source must have a pointwise_kernel"),
        ([np.ones((3, 6, 1)), np.ones((1, 6, 4))], ValueError, "must have four dimensions"),
        (
            {
                f"{name}/{array}": 1.0
                for name in ("a", "b")
                for array in ("depthwise_kernel", "pointwise_kernel")
            },
            ValueError,
            "source must hold one layer under the prefix, got a, b",
        ),
        (
            {"s/depthwise_kernel:0": 1.0, "s/pointwise_kernel:0": 1.0, "bn/gamma:0": 1.0},
            ValueError,
            "source must hold one layer under the prefix, got s, bn",
        ),
        (
            {"s/depthwise_kernel": 1.0, "s/pointwise_kernel": 1.0, "s/gamma": 1.0},
            ValueError,
            "and no more, got s/depthwise_kernel, s/pointwise_kernel, s/gamma",
        ),
        (
            {"bias:0": 1.0, "depthwise_kernel:0": 1.0, "pointwise_kernel:0": 1.0, "bias:1": 1.0},
            ValueError,
            "source must have one each of depthwise_kernel, pointwise_kernel, bias and no more",
        ),
        (
            {"depthwise_kernel": 1.0, "pointwise_kernel": "x"},
            TypeError,
            "pointwise_kernel must be a tensor or",
        ),
        ({1: 3}, TypeError, "source must have names as its keys, got 1"),
        (
            STATE | {"depthwise.weight": None},
            TypeError,
            "depthwise.weight must be a tensor or an array of numbers, got NoneType",
        ),
        (
            STATE
            | {"pointwise.norm.running_mean": torch.ones(1), "pointwise.norm.running_var": torch.ones(4)},
            ValueError,
            r"pointwise.norm's running_mean must be \[4\] as the pointwise .* got \[1\]",
        ),
    ],
)
def test_what_does_not_fit_leaves_the_layer_alone(source, error, message):
    layer = SeparableConv2d(6, 4, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(error, match=message):
        load_from(layer, source)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_another_layer():
    with pytest.raises(TypeError, match="layer must be a SeparableConv2d, got Conv2d"):
        load_from(nn.Conv2d(3, 3, 3), STATE)
