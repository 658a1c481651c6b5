"""fastsep.models: sizes as published, and that they train and are optimized."""

from __future__ import annotations

import pytest
import torch
from networks import network, randomize_norms
from torch import nn

import fastsep
from fastsep import models
from fastsep.models import MobileNetV1, MobileNetV2, MultiModelBlock


def parameters(model: nn.Module, *, norms: bool = True) -> int:
    modules = [m for m in model.modules() if norms or not isinstance(m, nn.BatchNorm2d)]
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False))


@pytest.mark.parametrize(
    ("name", "with_norms", "without_norms", "multiply_adds"),
    [
        # "MobileNets", table 4: 4.2 and 29.3 million parameters, 569 and 4,866 million multiply-adds. The
        # dense network's are without those of the classifier, 1.024 million.
        ("mobilenet_v1", 4_231_976, 4_210_088, 568_740_352),
        ("mobilenet_v1_dense", 29_294_088, 29_282_120, 4_866_269_184 + 1_024_000),
        # "MobileNetV2", table 4: 3.4 million and 300 million.
        ("mobilenet_v2", 3_504_872, 3_470_760, 300_774_272),
        # "Xception", table 3: 22,855,952 parameters.
        ("xception", 22_855_952, 22_801_424, 8_357_403_496),
        ("multimodel_block", 1_073_152, 1_073_152, 136_577_024),
        # The sum of the book's layers for 10 classes.
        ("sepcnn_keras", 155 + 2400 + 4736 + 8896 + 9408 + 8896 + 4128 + 330, 38_949, 20_317_676),
        ("sepcnn_torch", 49_418, 48_458, 7_694_848),
    ],
)
def test_sizes(name, with_norms, without_norms, multiply_adds):
    model = models.NETWORKS[name]()
    assert parameters(model) == with_norms
    assert parameters(model, norms=False) == without_norms
    assert fastsep.cost(model).multiply_adds == multiply_adds


@pytest.mark.parametrize(
    ("width", "size", "millions", "million_parameters"),
    [
        (0.75, 224, 325, 2.6),
        (0.5, 224, 149, 1.3),
        (0.25, 224, 41, 0.5),
        (1.0, 192, 418, 4.2),
        (1.0, 160, 290, 4.2),
        (1.0, 128, 186, 4.2),
    ],
)
def test_multipliers(width, size, millions, million_parameters):
    """ "MobileNets", tables 6 and 7."""
    model = MobileNetV1(width_multiplier=width, resolution_multiplier=size / 224)
    assert model.input_size == (3, size, size)
    assert fastsep.cost(model).multiply_adds // 10**6 == millions
    assert round(parameters(model) / 1e6, 1) == million_parameters


@pytest.mark.parametrize("name", models.NETWORKS)
def test_optimized_and_trained(name):
    torch.manual_seed(0)
    model = models.NETWORKS[name]()
    size = (3, 64, 64) if model.input_size[-1] > 64 else model.input_size
    x = torch.randn(2, *size)
    y = model(x)
    y.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    randomize_norms(model.eval())
    with torch.no_grad():
        expected = model(x)
    optimized = fastsep.optimize(model, x)
    report = fastsep.report(optimized)
    assert not report.left
    assert len(report.fused) == {"mobilenet_v1": 13, "mobilenet_v2": 17, "xception": 34}.get(
        name, len(report.fused)
    )
    torch.testing.assert_close(
        optimized(x).detach(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


def test_mobilenet_v2_is_torchvisions():
    """The same weights in the same order give the same result."""
    theirs = network("torchvision/mobilenet_v2")
    ours = MobileNetV2()
    weights = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(weights)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x))


def test_xception_is_timms():
    """The same weights give the same result."""
    theirs = network("timm/legacy_xception")
    ours = models.Xception().eval()
    by_shape = [sorted(tuple(v.shape) for v in model.state_dict().values()) for model in (ours, theirs)]
    assert by_shape[0] == by_shape[1]
    load_in_order_of_calls(ours, theirs, torch.randn(1, 3, 96, 96))
    x = torch.randn(2, 3, 75, 83)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def load_in_order_of_calls(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Both call the same layers, but their children are in another order."""
    for mine, its in zip(layers_called(ours, x), layers_called(theirs, x), strict=True):
        mine.load_state_dict(its.state_dict())


def layers_called(model: nn.Module, x: torch.Tensor) -> list[nn.Module]:
    called: list[nn.Module] = []
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    hooks = [layer.register_forward_hook(lambda layer, *_: called.append(layer)) for layer in layers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return called


def test_multimodel_block_by_its_formula():
    """hidden2 = x + step(step(x)), result = x + step(step(hidden2)), step = norm(conv(relu))."""
    torch.manual_seed(0)
    block = MultiModelBlock(4).double().eval()
    x = torch.randn(2, 4, 30, 1, dtype=torch.float64)

    def step(module, x, reach):
        dw, pw = module.conv.depthwise, module.conv.pointwise
        dilation = dw.dilation[0]
        padded = nn.functional.pad(x.relu(), (0, 0, reach, reach))
        taps = [
            padded[:, :, r * dilation : r * dilation + 30] * dw.weight[:, 0, r].view(1, -1, 1, 1)
            for r in range(dw.kernel_size[0])
        ]
        y = torch.einsum("ki,nihw->nkhw", pw.weight[:, :, 0, 0], sum(taps)) + pw.bias.view(1, -1, 1, 1)
        mean, variance = y.mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
        return (y - mean) / (variance + 1e-5).sqrt()

    hidden = x + step(block.step2, step(block.step1, x, 1), 1)
    expected = x + step(block.step4, step(block.step3, hidden, 7), 56)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MobileNetV1(0), "classes must be above 0, got 0"),
        (lambda: MobileNetV1(width_multiplier=-1), "width_multiplier must be above 0, got -1"),
        (lambda: MobileNetV1(resolution_multiplier=0), "resolution_multiplier must be above 0, got 0"),
        (lambda: MobileNetV2(width_multiplier=0), "width_multiplier must be above 0, got 0"),
        (lambda: models.Xception(0), "classes must be above 0, got 0"),
        (lambda: MultiModelBlock(0), "channels must be above 0, got 0"),
        (lambda: models.SepCNNKeras(0), "classes must be above 0, got 0"),
        (lambda: models.SepCNNTorch(0), "classes must be above 0, got 0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
