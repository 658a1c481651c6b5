"""torch.export and ONNX: plain convolutions come out, and other programs compute the same with them."""

from __future__ import annotations

import warnings

import pytest
import torch
from networks import network, randomize_norms
from torch import nn

import fastsep
from fastsep import DepthwiseConv2d, SeparableConv2d, models

onnxruntime = pytest.importorskip("onnxruntime")

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def layer_built() -> nn.Module:
    torch.manual_seed(0)
    model = models.SepCNNTorch()
    randomize_norms(model)
    return model.eval()


def frozen(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, SeparableConv2d):
            module.freeze()
    return model


def layers_with_everything() -> nn.Module:
    """Uneven padding, a stride, a multiplier, both biases and two activations."""
    torch.manual_seed(0)
    return nn.Sequential(
        SeparableConv2d(3, 8, 3, stride=2, padding="same", activation="hardswish"),
        SeparableConv2d(8, 6, (5, 3), padding=((2, 1), (0, 1)), depth_multiplier=2, mid_activation="relu6"),
        DepthwiseConv2d(6, 6, 3, stride=2, padding="same", activation="relu"),
        SeparableConv2d(6, 5, 3, dilation=1, depthwise_bias=True, mid_activation="silu", activation="gelu"),
    ).eval()


MODELS = {
    "layers": layer_built,
    "frozen_layers": lambda: frozen(layer_built()),
    "optimized_layers": lambda: fastsep.optimize(layer_built()),
    "everything": layers_with_everything,
    "optimized_everything": lambda: fastsep.optimize(layers_with_everything()),
    "optimized_network": lambda: fastsep.optimize(network("torchvision/mobilenet_v2")),
}


def exported_to_onnx(model: nn.Module, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its dependencies
        torch.onnx.export(model, (X,), path, dynamo=True, verbose=False)


@pytest.mark.parametrize("name", MODELS)
def test_onnx(name, tmp_path):
    import onnx

    model = MODELS[name]()
    path = str(tmp_path / "model.onnx")
    exported_to_onnx(model, path)
    nodes = onnx.load(path).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert "Conv" in {node.op_type for node in nodes}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    with torch.no_grad():
        expected = model(X)
    limit = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=limit)


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name):
    model = MODELS[name]()
    with torch.no_grad():
        program = torch.export.export(model, (X,)).run_decompositions(fastsep.decompositions())
        got, expected = program.module()(X), model(X)
    assert not [node for node in program.graph.nodes if "fastsep" in str(node.target)]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow
def test_torch_compile():
    model = layer_built()
    optimized = fastsep.optimize(model)
    with torch.no_grad():
        got = torch.compile(optimized, fullgraph=True)(X)
        torch.testing.assert_close(got, model(X), rtol=1e-4, atol=1e-4)
