"""TensorFlow's "same" with a stride, in all that takes a layer apart."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import fastsep
from fastsep import DepthwiseConv2d, SeparableConv2d, functional

SIZES = [(8, 9), (9, 8), (11, 12), (7, 7)]


def image(size):
    return torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(0))


def separable(kernel=3, stride=2):
    torch.manual_seed(0)
    return SeparableConv2d(6, 5, kernel, stride, "same", depthwise_bias=True).eval()


def depthwise(kernel=3, stride=2):
    torch.manual_seed(0)
    return DepthwiseConv2d(6, 6, kernel, stride, "same").eval()


def by_hand(layer, x):
    """The padding written out, and torch's convolutions."""
    conv = layer if isinstance(layer, DepthwiseConv2d) else layer.depthwise
    pads = []
    for size, kernel, stride in zip(x.shape[-2:], conv.kernel_size, conv.stride, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        pads = [total // 2, total - total // 2, *pads]
    y = nn.functional.conv2d(nn.functional.pad(x, pads), conv.weight, conv.bias, conv.stride, 0, 1, 6)
    return y if isinstance(layer, DepthwiseConv2d) else layer.pointwise(y)


@pytest.mark.parametrize("kernel", [1, 2, 3, (5, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3, (4, 1)])
@pytest.mark.parametrize("make", [separable, depthwise])
def test_padding(make, kernel, stride):
    layer = make(kernel, stride)
    for size in SIZES:
        torch.testing.assert_close(layer(image(size)), by_hand(layer, image(size)))


def holds_for_other_sizes(transformed, layer):
    for size in SIZES:
        torch.testing.assert_close(
            transformed(image(size)), by_hand(layer, image(size)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kernel", [1, 3])  # smaller than the stride, and larger
@pytest.mark.parametrize("make", [separable, depthwise])
class TestTransformed:
    def test_trace(self, make, kernel):
        layer = make(kernel)
        holds_for_other_sizes(torch.jit.trace(layer, image((9, 9))), layer)

    @pytest.mark.slow
    @pytest.mark.parametrize("decomposed", [False, True])
    def test_export(self, make, kernel, decomposed):
        layer = make(kernel)
        sizes = {2: Dim("rows", min=4, max=64), 3: Dim("columns", min=4, max=64)}
        program = export(layer, (image((9, 9)),), dynamic_shapes=(sizes,))
        if decomposed:
            program = program.run_decompositions(fastsep.decompositions())
        holds_for_other_sizes(program.module(), layer)

    def test_fx(self, make, kernel):
        layer = make(kernel)
        holds_for_other_sizes(torch.fx.symbolic_trace(layer), layer)

    @pytest.mark.slow
    @pytest.mark.parametrize("dynamo", [False, True])
    def test_onnx(self, make, kernel, dynamo, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        layer, path = make(kernel), tmp_path / "layer.onnx"
        options = (
            {"dynamic_shapes": ({2: Dim("rows", min=4, max=64), 3: Dim("columns", min=4, max=64)},)}
            if dynamo
            else {"dynamic_axes": {"input": {2: "rows", 3: "columns"}}, "input_names": ["input"]}
        )
        torch.onnx.export(layer, (image((9, 9)),), path, dynamo=dynamo, verbose=False, **options)
        session = onnxruntime.InferenceSession(path)
        name = session.get_inputs()[0].name
        holds_for_other_sizes(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), layer)


class Adapted(nn.Module):
    """What a library for low-rank adapters puts in a convolution's place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.scale = base, nn.Parameter(torch.ones(1))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) * self.scale


def test_an_adapter_around_the_child():
    layer, own = separable(), separable()
    layer.depthwise = Adapted(layer.depthwise)
    holds_for_other_sizes(layer, own)


def test_flattened_weights():
    """As FSDP leaves them outside of the child's own forward."""
    layer, own = separable(), separable()
    weight = layer.depthwise.weight.detach().clone()
    del layer.depthwise._parameters["weight"]
    layer.depthwise.weight = weight.flatten()
    layer.depthwise.register_forward_pre_hook(lambda module, _inputs: setattr(module, "weight", weight))
    layer.depthwise.register_forward_hook(lambda module, *_: setattr(module, "weight", weight.flatten()))
    holds_for_other_sizes(layer, own)


def test_a_child_whose_weight_is_a_method():
    """As a quantized convolution's is."""
    layer, own = separable(), separable()

    class Quantized(Adapted):
        kernel_size, stride, dilation = (3, 3), (2, 2), (1, 1)

        def weight(self):
            return self.base_layer.weight

    layer.depthwise = Quantized(layer.depthwise)
    holds_for_other_sizes(layer, own)


def test_another_child_counts():
    layer = separable()
    layer.depthwise = nn.Conv2d(6, 6, 5, 3, groups=6)
    holds_for_other_sizes(layer, layer)
    assert layer.kernel_size == (5, 5)
    assert layer.stride == (3, 3)


def test_symbols_are_not_asked():
    """By torch.export with sizes that are named, a condition on one would be a guard."""
    x = image((9, 9))
    assert functional.same_padding(x, (3, 3), (2, 2), (1, 1)) == (1, 1, 1, 1)
    assert functional.same_padding(x[:, :, :8], (3, 2), (2, 3), (1, 1)) == (0, 1, 0, 0)
