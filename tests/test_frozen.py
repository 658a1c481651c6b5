"""freeze() and unfreeze()."""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, VARIETIES, varied
from torch import nn
from torch.nn.utils import parametrizations

import fastsep
from fastsep import SeparableConv2d, _native, _ops
from fastsep._case import LAYOUTS

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(1))


def layer(**options):
    torch.manual_seed(0)
    return SeparableConv2d(6, 7, 3, **{"padding": 1, "mid_activation": "relu6"} | options)


@pytest.fixture
def packed_calls(monkeypatch):
    """For every native call the packed weights that it was given, or None."""
    calls = []
    kernel = _ops.cpu_kernel
    monkeypatch.setattr(_ops, "cpu_kernel", lambda *args: calls.append(args[5]) or kernel(*args))
    return calls


@pytest.mark.parametrize("name", ["both_biases", "multiplier_3", "kernel_5x3", "channels_127_to_129", "silu"])
@pytest.mark.parametrize("variety", VARIETIES, ids="-".join)
def test_packed_weights_change_no_bit(name, variety, packed_calls):
    case = varied(BY_NAME[name], *variety)
    tensors = case.tensors()
    options = case.options
    frozen = SeparableConv2d(
        *(case.c, case.k, (case.kh, case.kw), options.pop("stride"), options.pop("padding")),
        *(options.pop("dilation"), case.m, bool(case.b)),
        depthwise_bias=bool(case.db),
        dtype=tensors["input"].dtype,
        **options,
    )
    names = {"depthwise.weight": "depthwise_weight", "pointwise.weight": "pointwise_weight"}
    names |= {"pointwise.bias": "bias"} if case.b else {}
    names |= {"depthwise.bias": "depthwise_bias"} if case.db else {}
    frozen.load_state_dict({ours: tensors[theirs] for ours, theirs in names.items()})
    expected = fastsep.separable_conv2d(**tensors, **case.options)
    frozen.freeze()
    for format in LAYOUTS.values():  # one packing serves both, and every size
        x = tensors["input"].contiguous(memory_format=format)
        torch.testing.assert_close(frozen(x), expected)
    assert torch.equal(frozen(tensors["input"]), expected)
    assert torch.equal(
        frozen(tensors["input"][..., 1:]), frozen.unfreeze()(tensors["input"][..., 1:]).detach()
    )
    used = [packed is not None for packed in packed_calls]
    assert used == [False, True, True, True, True, False]


def test_packed_tensor():
    packed = layer().freeze()._packed
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.data_ptr() % 64 == 0


def test_requires_grad_comes_back():
    frozen = layer(depthwise_bias=True)
    frozen.depthwise.weight.requires_grad_(False)
    before = [p.requires_grad for p in frozen.parameters()]
    assert frozen.freeze() is frozen
    assert frozen.frozen
    frozen.freeze()  # a second time remembers no less
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen(X).requires_grad
    assert frozen.unfreeze() is frozen
    assert not frozen.frozen
    assert [p.requires_grad for p in frozen.parameters()] == before
    assert frozen._packed is None
    assert frozen(X).requires_grad


def test_writes_count_and_are_packed_in_the_next_call():
    frozen = layer().freeze()
    before, packed = frozen(X), frozen._packed
    with torch.no_grad():
        frozen.pointwise.weight.zero_()
    for _ in range(2):
        assert torch.equal(frozen(X), frozen.pointwise.bias.view(1, -1, 1, 1).expand(before.shape))
    assert frozen._packed is not packed
    assert frozen._packed.made_of.holds()


def other_weights():
    torch.manual_seed(1)
    return SeparableConv2d(6, 7, 3, padding=1, mid_activation="relu6")


CHANGES = {
    "load_state_dict": lambda model, other: model.load_state_dict(
        {f"0.{k}": v for k, v in other.state_dict().items()}
    ),
    "load_and_assign": lambda model, other: model.load_state_dict(
        {f"0.{k}": v for k, v in other.state_dict().items()}, assign=True
    ),
    "through_meta": lambda model, other: (
        model.to("meta").to_empty(device="cpu"),
        model[0].load_state_dict(other.state_dict()),
    ),
    "replaced_child": lambda model, other: (
        setattr(model[0], "depthwise", other.depthwise) or setattr(model[0], "pointwise", other.pointwise)
    ),
    "replaced_parameter": lambda model, other: (
        setattr(model[0].depthwise, "weight", other.depthwise.weight)
        or setattr(model[0].pointwise, "weight", other.pointwise.weight)
        or setattr(model[0].pointwise, "bias", other.pointwise.bias)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_count_at_once(change):
    """Where they come by a way that the layer sees."""
    model = nn.Sequential(layer().freeze())
    CHANGES[change](model, other_weights())
    assert torch.equal(model(X), other_weights()(X))


@pytest.mark.parametrize(
    "names", [(), *((name,) for name, _ in layer(depthwise_bias=True).named_parameters())], ids=str
)
def test_functional_call_with_other_weights(names):
    """With all of them, or with one alone."""
    plain = layer(depthwise_bias=True)
    frozen = layer(depthwise_bias=True).freeze()
    other = {
        name: parameter.detach() + 1
        for name, parameter in plain.named_parameters()
        if not names or name in names
    }
    expected = torch.func.functional_call(plain, other, (X,))
    assert torch.equal(torch.func.functional_call(frozen, other, (X,)), expected)
    assert not torch.equal(frozen(X), expected)
    assert torch.equal(frozen(X), plain(X))


def test_conversion(packed_calls):
    frozen = layer().freeze()
    assert torch.equal(frozen.double()(X.double()), layer().double()(X.double()))
    assert frozen(X.double()).dtype == torch.float64
    assert packed_calls[0] is not None
    torch.testing.assert_close(frozen.bfloat16()(X.bfloat16()), layer().bfloat16()(X.bfloat16()))
    assert frozen._packed is None
    assert torch.equal(frozen.float()(X), layer().double().bfloat16().float()(X))
    assert frozen._packed is not None


def test_gradient_of_the_input():
    x = X.clone().requires_grad_()
    frozen = layer().freeze()
    (got,) = torch.autograd.grad(frozen(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer()(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


def test_trains_after_unfreeze():
    thawed = layer().freeze().unfreeze()
    optimizer = torch.optim.SGD(thawed.parameters(), lr=0.1)
    before = thawed(X)
    before.square().sum().backward()
    optimizer.step()
    assert not torch.allclose(thawed(X), before)


def test_parametrized_child_is_not_packed():
    """Its weight is computed in each call, in training another one each time."""
    frozen = layer()
    parametrizations.spectral_norm(frozen.depthwise)
    frozen.freeze()
    assert frozen._packed is None
    first = frozen(X)
    assert not torch.equal(frozen(X), first)


def test_hook_after_freeze():
    frozen = layer().freeze()
    frozen.pointwise.register_forward_hook(lambda _m, _x, y: y + 1)
    torch.testing.assert_close(frozen(X), layer()(X).detach() + 1)


def test_misplaced_packed_weights_are_not_used(monkeypatch):
    """A copy of them, as a compiler may make one, can lie at any address."""
    used = []
    forward = _native.core.forward_packed
    monkeypatch.setattr(_native.core, "forward_packed", lambda *args: used.append(args[3]) or forward(*args))
    frozen = layer().freeze()
    weights = frozen.depthwise.weight, frozen.pointwise.weight, None, frozen.pointwise.bias
    size = frozen._packed.numel()
    for packed in (frozen._packed, torch.cat([torch.zeros(1, dtype=torch.uint8), frozen._packed])[1:]):
        y = torch.ops.fastsep.separable_conv2d(
            *(X, *weights, packed), [1, 1], [1, 1, 1, 1], [1, 1], "relu6", "identity"
        )
        assert packed.numel() == size
        assert used == [frozen._packed.data_ptr()]
        torch.testing.assert_close(y, layer()(X))
    garbage = torch.zeros(size, dtype=torch.uint8)
    y = torch.ops.fastsep.separable_conv2d(
        *(X, *weights, garbage), [1, 1], [1, 1, 1, 1], [1, 1], "relu6", "identity"
    )
    torch.testing.assert_close(y, layer()(X))
    assert len(used) == 1
