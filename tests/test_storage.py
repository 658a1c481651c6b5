"""Tensors whose numbers are not what lies at their addresses: native code gets none of them."""

import copy
import warnings

import pytest
import torch
from optimizing import Block, made
from torch import nn

import fastsep
from fastsep import DepthwiseConv2d, SeparableConv2d, _native, separable_conv2d

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")

X = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(0))
FREED = "must have memory|not allocated"


def layer(**options):
    torch.manual_seed(0)
    return SeparableConv2d(8, 4, 3, depthwise_bias=True, **options).eval()


def composed(layer, x):
    return layer.pointwise(layer.depthwise(x))


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def shortened(x):
    """A view behind which its storage ends."""
    room = torch.randn(x.numel() + 16)
    view = room[16:].view(x.shape)
    room.untyped_storage().resize_(64)
    return view


def zeros_of_autograd(shape):
    """A tensor of zeros without memory."""
    x = torch.randn(shape, requires_grad=True)
    (zero,) = torch.autograd.grad(torch.sgn(x).sum(), x)
    assert zero._is_zerotensor()
    return zero


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor([X[0], X[1]])


@needs_native
@pytest.mark.parametrize(
    "tensor",
    [
        freed(X),
        shortened(X),
        zeros_of_autograd((2, 3)),
        torch._neg_view(X),
        torch.zeros(2, 2, dtype=torch.complex64).conj().imag,
        X.to_sparse(),
        X.to("meta"),
        nested(),
        X.as_subclass(type("Other", (torch.Tensor,), {})),
        X.numpy(),
        3,
    ],
    ids=lambda tensor: type(tensor).__name__,
)
def test_what_is_not_stored(tensor):
    assert _native.stored(tensor) == 0
    assert _native.stored(X, tensor) == 0


@needs_native
@pytest.mark.parametrize(
    "tensor",
    [
        *(X, X[:, 1:], X.mT, X[:0], X[..., :0], nn.Parameter(X), X.half(), X.long()),
        *(torch.tensor(1.0), X.expand(3, 2, 8, 9, 10)),
    ],
    ids=lambda tensor: str(tuple(tensor.shape)),
)  # fmt: skip
def test_what_is_stored(tensor):
    assert _native.stored(tensor) == 1
    assert _native.stored(None, tensor, X) == 1


@needs_native
@pytest.mark.parametrize("damage", [freed, shortened])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_input_without_memory(damage, frozen):
    one = layer().freeze() if frozen else layer()
    with pytest.raises(RuntimeError, match=FREED), torch.no_grad():
        one(damage(X))
    with torch.no_grad():
        torch.testing.assert_close(one(X), composed(one, X))


@needs_native
@pytest.mark.parametrize("name", ["depthwise.weight", "depthwise.bias", "pointwise.weight", "pointwise.bias"])
@pytest.mark.parametrize("freeze", ["before", "after", "never"])
def test_a_weight_without_memory(name, freeze):
    one = layer()
    if freeze == "before":
        one.freeze()(X)
    one.get_parameter(name).untyped_storage().resize_(0)
    with torch.no_grad():
        if freeze == "after":
            with pytest.raises(RuntimeError, match=FREED):
                one.freeze()
        for _ in range(3):
            with pytest.raises(RuntimeError, match=FREED):
                one(X)


@needs_native
def test_a_layer_of_one_half_without_memory():
    one = DepthwiseConv2d(8, 8, 3)
    with pytest.raises(RuntimeError, match=FREED):
        one(freed(X))


@needs_native
def test_memory_freed_between_forward_and_backward():
    for name in ("input", "depthwise.weight", "pointwise.weight"):
        one = layer().train()
        x = X.clone().requires_grad_()
        y = one(x)
        (x if name == "input" else one.get_parameter(name)).untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=FREED):
            y.sum().backward()


@needs_native
def test_an_optimized_model_without_memory():
    optimized = fastsep.optimize(made(Block()))
    with torch.no_grad():
        expected = optimized(X)
        with pytest.raises(RuntimeError, match=FREED):
            optimized(freed(X))
        torch.testing.assert_close(optimized(X), expected)
        optimized.pointwise.weight.untyped_storage().resize_(0)
        for _ in range(4):
            with pytest.raises(RuntimeError, match=FREED):
                optimized(X)


def test_zeros_of_autograd():
    one = layer()
    torch.testing.assert_close(one(zeros_of_autograd(X.shape)), composed(one, torch.zeros_like(X)))
    zeros = zeros_of_autograd(X.shape)
    with torch.no_grad():
        torch.testing.assert_close(one.freeze()(zeros), composed(one, torch.zeros_like(X)))
    assert not separable_conv2d(X, zeros_of_autograd((8, 1, 3, 3)), torch.randn(4, 8, 1, 1)).any()
    assert not separable_conv2d(X, torch.randn(8, 1, 3, 3), zeros_of_autograd((4, 8, 1, 1))).any()
    one.unfreeze()
    zeros = zeros_of_autograd((4, 8, 1, 1))
    with torch.no_grad():
        one.pointwise.weight = nn.Parameter(zeros)
        expected = one.pointwise.bias.view(1, -1, 1, 1).expand(2, 4, 7, 8)
        torch.testing.assert_close(one(X), expected)
        torch.testing.assert_close(one.freeze()(X), expected)


def test_weights_that_are_negative_views():
    one, other = layer(), layer()
    weight = one.pointwise.weight.detach()
    other.pointwise.weight = nn.Parameter(torch._neg_view(-weight))
    assert other.pointwise.weight.is_neg()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(other(X), one(X))
            other.freeze()


@pytest.mark.parametrize("frozen", [False, True])
def test_another_default_device(frozen):
    one, optimized = layer(), fastsep.optimize(made(Block()))
    with torch.no_grad():
        expected, wanted = one(X), optimized(X)
        with torch.device("meta"):
            if frozen:
                one.freeze()
            copied, again = copy.deepcopy(one), copy.deepcopy(optimized)
            results = [one(X), copied(X)], [optimized(X), again(X), again(X), again(X)]
    for ours, theirs in zip(results, (expected, wanted), strict=True):
        for result in ours:
            torch.testing.assert_close(result, theirs, rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        trained = layer().to_empty(device="cpu")
    trained.load_state_dict(one.state_dict())
    with torch.device("meta"):
        trained(X).sum().backward()
    assert trained.pointwise.weight.grad.device.type == "cpu"
