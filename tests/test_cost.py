"""fastsep.cost."""

from __future__ import annotations

import json

import pytest
import torch
from commands import run
from networks import network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastsep
from fastsep import Machine, SeparableConv2d, _cost, cost
from fastsep._cost import separable_ratio


def test_ratio():
    """1/N + 1/k^2, as in the literature."""
    assert round(separable_ratio(3 * 3, 1024), 3) == 0.112
    assert round(separable_ratio(512 * 512, 100), 6) == 0.010004
    (layer,) = cost(SeparableConv2d(8, 1024, 3, padding=1), (8, 16, 16)).layers
    assert layer.ratio == separable_ratio(9, 1024) == layer.multiply_adds / layer.dense_multiply_adds


def test_a_layer_by_hand():
    """5 x 5 on 8 x 8 x 3 -> 256."""
    costs = cost(SeparableConv2d(3, 256, 5, padding=2, bias=False), (3, 8, 8))
    (layer,) = costs.layers
    assert layer.dense_multiply_adds == costs.dense_multiply_adds == 1_228_800
    assert layer.multiply_adds == costs.multiply_adds == 4_800 + 49_152
    assert layer.parameters == costs.parameters == 3 * 25 + 3 * 256
    assert layer.bytes_fused == 4 * (3 * 64 + 256 * 64 + 843)
    assert layer.bytes_unfused == layer.bytes_fused + 4 * 2 * 3 * 64
    assert layer.intensity == 2 * 53_952 / layer.bytes_fused
    assert (layer.input_size, layer.output_size, layer.kind) == ((1, 3, 8, 8), (1, 256, 8, 8), "separable")


def test_multiplier_stride_and_batch():
    layer = SeparableConv2d(4, 6, (3, 5), stride=2, depth_multiplier=3, padding=(1, 2), dtype=torch.float64)
    (row,) = cost(layer, (2, 4, 9, 9)).layers
    pixels = 2 * 5 * 5
    assert row.multiply_adds == pixels * 12 * (15 + 6)
    assert row.dense_multiply_adds == pixels * 4 * 15 * 6
    assert row.ratio == pytest.approx(row.multiply_adds / row.dense_multiply_adds)
    assert row.bytes_unfused - row.bytes_fused == 8 * 2 * pixels * 12


@pytest.mark.parametrize(
    "name", ["torchvision/mobilenet_v2", "torchvision/mobilenet_v3_large", "mobilenet_v1"]
)
def test_sums_are_those_of_torchs_counter(name):
    model = network(name)
    x = torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    costs = cost(model, x.shape)
    assert 2 * costs.multiply_adds == counter.get_total_flops()
    assert costs.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_pairs_are_those_that_can_be_fused():
    kinds = [layer.kind for layer in cost(network("torchvision/mobilenet_v3_large"), (3, 64, 64)).layers]
    fused = kinds.count("separable"), kinds.count("expanded")
    assert fused == (0, 7)  # behind the stem, and behind an expansion each
    assert kinds.count("depthwise") == 8


def test_inverted_residuals_by_hand():
    """MobileNetV2: the image's convolution with the first pair, and 16 times 1 x 1, 3 x 3, 1 x 1."""
    costs = cost(network("mobilenet_v2"))
    kinds = [layer.kind for layer in costs.layers]
    assert kinds == ["expanded"] * 17 + ["dense", "linear"]
    stem, second = costs.layers[:2]
    plane = 112 * 112
    assert (stem.input_size, stem.output_size) == ((1, 3, 224, 224), (1, 16, 112, 112))
    assert stem.parameters == 27 * 32 + 9 * 32 + 32 * 16
    assert stem.bytes_fused == 4 * (3 * 224 * 224 + 16 * plane + stem.parameters)
    assert stem.bytes_unfused == stem.bytes_fused + 4 * 2 * 2 * 32 * plane
    assert stem.multiply_adds == plane * (27 * 32 + 9 * 32 + 32 * 16)
    # 16 channels become 96 and, on a quarter of the pixels, 24.
    assert second.parameters == 16 * 96 + 9 * 96 + 96 * 24
    assert second.multiply_adds == plane * 16 * 96 + plane // 4 * (9 * 96 + 96 * 24)
    assert second.bytes_fused == 4 * (16 * plane + 24 * plane // 4 + second.parameters)
    assert second.bytes_unfused == second.bytes_fused + 4 * 2 * (96 * plane + 96 * plane // 4)
    assert second.dense_multiply_adds == plane * 16 * 96 + plane // 4 * 9 * 96 * 24
    assert second.ratio == second.multiply_adds / second.dense_multiply_adds


def test_what_is_no_expansion():
    """Of another tensor than an image, strided, grouped, or before a depth multiplier."""
    pair = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)
    for first in (nn.Conv2d(5, 8, 3), nn.Conv2d(5, 8, 1, 2), nn.Conv2d(4, 8, 1, groups=2)):
        _, row = cost(nn.Sequential(first, *pair), (first.in_channels, 9, 9)).layers
        assert row.kind == "separable"
    layer = SeparableConv2d(8, 4, 3, depth_multiplier=2)
    assert [row.kind for row in cost(nn.Sequential(nn.Conv2d(5, 8, 1), layer), (5, 9, 9)).layers][
        1
    ] == "separable"
    (row,) = cost(nn.Sequential(nn.Conv2d(5, 8, 1), SeparableConv2d(8, 4, 3)), (5, 9, 9), measure=True).layers
    assert row.kind == "expanded"
    assert row.measured_seconds > 0


def test_dense_twin():
    """Its parameters, bytes and time, beside its multiply-adds."""
    costs = cost(network("mobilenet_v1"), machine=Machine("a", 1e9, 1e9))
    assert costs.dense_parameters == 29_282_120  # MobileNetV1's published twin, without norms
    twin = cost(network("mobilenet_v1_dense"), machine=Machine("a", 1e9, 1e9))
    assert costs.dense_multiply_adds == twin.multiply_adds
    assert costs.dense_bytes == twin.bytes_unfused
    assert costs.dense_predicted_seconds == pytest.approx(twin.predicted_seconds)


def test_the_model_is_left_alone():
    model = nn.Sequential(SeparableConv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost(model, (4, 3, 9, 9))
    assert model.training
    assert not model[0]._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_prediction():
    layer = SeparableConv2d(8, 8, 3, padding=1)
    slow_memory, slow_arithmetic = Machine("a", 1e18, 1e6), Machine("b", 1e6, 1e18)
    assert cost(layer, (8, 4, 4), machine=slow_memory).predicted_seconds == pytest.approx(
        4 * (8 * 16 + 8 * 16 + 144) / 1e6
    )
    assert cost(layer, (8, 4, 4), machine=slow_arithmetic).predicted_seconds == 2 * 16 * 8 * 17 / 1e6
    named = [cost(layer, (8, 4, 4), machine=name).predicted_seconds for name in ("avx512", "neon")]
    assert 0 < named[0] <= named[1]
    assert cost(layer, (8, 4, 4)).predicted_seconds is None
    costs = cost(layer, (8, 4, 4), machine=Machine("c", 2 * 16 * 8 * 17 * 1e3, 1e18))
    head, *_, last = (line for line in str(costs).splitlines() if "predicted" in line or "sum" in line)
    assert head.split()[-2:] == ["predicted,", "ms"]
    assert last.split()[-1] == "1.000"


def test_measurement():
    costs = cost(nn.Sequential(SeparableConv2d(8, 16, 3), nn.Conv2d(16, 8, 3, 2)), (8, 20, 20), measure=True)
    assert costs.measured_seconds == sum(layer.measured_seconds for layer in costs.layers) > 0


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (SeparableConv2d(4, 6, 3, stride=2, padding="same"), (4, 9, 9)),
        (SeparableConv2d(4, 6, 3, padding=((0, 1), (2, 1)), padding_mode="replicate"), (4, 5, 5)),
        (SeparableConv2d(4, 6, 5, padding=((2, 1), (1, 2)), dtype=torch.float64), (4, 3, 3)),
        (
            nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), nn.Conv2d(4, 6, 1)
            ),
            (4, 5, 5),
        ),
    ],
)
def test_what_is_measured_is_the_layer(layer, size, monkeypatch):
    """Its padding, the padding's mode and the dtype, whatever SeparableConv2d keeps of them itself."""
    results = []
    monkeypatch.setattr(_cost, "_median_seconds", lambda call: results.append(call()) or 1.0)
    ones = torch.ones(1, *size, dtype=next(layer.parameters()).dtype)
    monkeypatch.setattr(_cost.torch, "randn", lambda size, dtype: torch.ones(size, dtype=dtype))
    monkeypatch.setattr(
        nn.Conv2d, "reset_parameters", lambda conv: [nn.init.ones_(p) for p in conv.parameters()]
    )
    assert cost(layer, size, measure=True).measured_seconds == 1
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1)
        torch.testing.assert_close(results, [layer(ones)])


def test_layers_that_are_measured_are_watched_no_more(monkeypatch):
    calls = []
    cost_of = _cost._cost_of
    monkeypatch.setattr(_cost, "_cost_of", lambda *args: calls.append(args) or cost_of(*args))
    cost(nn.Conv2d(3, 4, 3), (3, 5, 5), measure=True)
    assert len(calls) == 1


def test_a_model_without_layers():
    costs = cost(nn.ReLU(), (3, 8, 8), machine="avx2", measure=True)
    assert (costs.multiply_adds, costs.layers) == (0, [])
    assert costs.predicted_seconds is costs.measured_seconds is None
    assert str(costs).startswith("ReLU on 1 x 3 x 8 x 8: 0 multiply-adds, 0 parameters")


def test_float64_takes_twice_the_arithmetic():
    machine = Machine("a", 1e6, 1e18)
    for layer in (SeparableConv2d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))):
        single = cost(layer, (8, 4, 4), machine=machine)
        double = cost(layer.double(), (8, 4, 4), machine=machine)
        half = cost(layer.bfloat16(), (8, 4, 4), machine=machine)
        assert double.predicted_seconds == 2 * single.predicted_seconds == 2 * half.predicted_seconds
        assert double.bytes_fused == 2 * single.bytes_fused == 4 * half.bytes_fused
        assert double.bytes_unfused == 2 * single.bytes_unfused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_size": (3, 0, 8)}, ValueError, "input_size must be"),
        ({"input_size": (3, 8)}, ValueError, "input_size must be"),
        ({"input_size": None}, ValueError, "input_size must be .* got None"),
        ({"machine": "abacus"}, ValueError, "machine must be one of measured, avx512, .* got 'abacus'"),
        ({"machine": 3}, TypeError, "machine must be a Machine or the name of one, got int"),
        ({"model": 3}, TypeError, "model must be an nn.Module, got int"),
        ({"input_size": (4, 8, 8)}, RuntimeError, "model must take an input of .*input must have 3 channels"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        cost(**{"model": SeparableConv2d(3, 8, 3), "input_size": (3, 8, 8)} | options)


def test_command():
    result = run("python -m fastsep cost mobilenet_v1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "MobileNetV1 on 1 x 3 x 224 x 224: 568.7 M multiply-adds, 4,231,976 parameters"
    assert lines[-1].startswith("Dense twin: 4,867.3 M multiply-adds; the ratio is 0.1168.")
    assert len([line for line in lines if "separable" in line]) == 12 + 1
    assert len([line for line in lines if "expanded" in line]) == 1
    assert "The twin's layers have 29.3 M parameters and move " in lines[-1]


def test_command_as_json():
    result = run("python -m fastsep cost sepcnn_torch --input 3x16x16 --machine avx2 --json")
    costs = json.loads(result.stdout)
    assert [layer["kind"] for layer in costs["layers"]] == ["expanded", *["separable"] * 2, "linear"]
    assert costs["layers"][0]["predicted_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("cost nothing", 2, "network must be one of mobilenet_v1,"),
        ("cost torchvision/nothing", 2, "network must be one of torchvision's, got 'torchvision/nothing'"),
        ("cost sepcnn_torch --input 3x16", 2, "must be CxHxW or NxCxHxW, got '3x16'"),
        ("cost sepcnn_torch --input 4x16x16", 2, "model must take an input of 1 x 4 x 16 x 16"),
        ("optimize timm/nothing", 2, "network must be one of timm's, got 'timm/nothing'"),
        (
            "optimize torchvision/nothing",
            2,
            "network must be one of torchvision's, got 'torchvision/nothing'",
        ),
    ],
)
def test_commands_that_cannot_be(arguments, status, message):
    result = run(f"python -m fastsep {arguments}")
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_optimize_command():
    result = run("python -m fastsep optimize torchvision/mobilenet_v3_large")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("MobileNetV3: 7 of 15 fused for inference, channels-last, largest error ")
    assert result.stdout.count("squeeze-and-excite between") == 8
    assert fastsep.__version__
