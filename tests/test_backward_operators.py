"""The operators that compute gradients: what they take and refuse, and what torch asks of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from cases import BY_NAME
from test_transforms import FORMATS
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fastsep
from fastsep import _backward, _native
from fastsep._activations import ACTIVATIONS
from fastsep._case import LAYOUTS
from fastsep._check import call, operands


def op_arguments(name, dtype="float32", layout="nchw", *, saved=False, integers=0, **change):
    """Of the operator that serves the case: with k=0 that of the depthwise half."""
    case = replace(BY_NAME[name], dtype=dtype, layout=layout, **change)
    tensors = case.tensors(integers=integers)
    x, dw, pw, db, b = operands(tensors)
    geometry = [case.sh, case.sw], [case.pt, case.pb, case.pl, case.pr], [case.dh, case.dw]
    if pw is None:
        return case.gradient(), x, dw, db, *geometry, case.mid, [True, True, db is not None]
    y = call(case, tensors) if saved else None
    needed = [tensor is not None for tensor in (x, dw, pw, db, b)]
    return case.gradient(), x, dw, pw, db, b, y, *geometry, case.mid, case.act, needed


def operator(args):
    return _backward.op if len(args) == 13 else _backward.depthwise_op


HALF = {"k": 0, "b": 0, "act": "identity"}


@pytest.mark.parametrize(
    ("dtype", "layout", "requires_grad"),
    [("float32", "nchw", False), ("float64", "nhwc", True), ("bfloat16", "nhwc", False)],
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("both_biases", {}),
        ("both_biases", HALF),
        ("stride_2_tf_same", {"act": "relu6", "saved": True}),
        ("stride_2_tf_same", {"act": "relu6"}),
        ("gelu_of_stride_and_multiplier", {}),
        ("gelu_of_stride_and_multiplier", HALF),
        ("no_images", {"act": "silu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_opcheck(name, options, dtype, layout, requires_grad):
    args = op_arguments(name, dtype, layout, **options)
    for x in args:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_(requires_grad)
    opcheck(operator(args), args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_is_used_or_computed_again(activation):
    """The operator needs no saved output, and gives the same bits with it, where it uses it."""
    args = op_arguments("both_biases", act=activation, saved=True)
    with_output = _backward.op(*args)
    without = _backward.op(*args[:6], None, *args[7:])
    assert len(with_output) == 5
    if _native.core.derivative_from_output(ACTIVATIONS[activation].code):
        for got, expected in zip(without, with_output, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("needed", list(product([False, True], repeat=5)), ids=str)
def test_operator_gives_what_is_needed(needed, monkeypatch):
    args = op_arguments("gelu_of_stride_and_multiplier", db=1)
    full = _backward.op(*args)
    some = [gradient for gradient, need in zip(full, needed, strict=True) if need]
    got = _backward.op(*args[:-1], list(needed))
    assert len(got) == sum(needed)
    assert all(torch.equal(a, b) for a, b in zip(got, some, strict=True))
    monkeypatch.setattr(_native, "core", None)
    for a, b in zip(_backward.op(*args[:-1], list(needed)), some, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_no_native_call_where_there_is_nothing_to_do(monkeypatch):
    looking = "derivative_from_output", "have_memory"
    core = SimpleNamespace(**{name: getattr(_native.core, name) for name in looking})
    monkeypatch.setattr(_native, "core", core)
    args = op_arguments("both_biases")
    assert _backward.op(*args[:-1], [False] * 5) == []
    zeros = _backward.op(*op_arguments("no_images", act="gelu"))
    assert [tuple(zero.shape) for zero in zeros] == [(0, 4, 5, 5), (4, 1, 3, 3), (4, 4, 1, 1)]
    assert not any(zero.any() for zero in zeros)


def bad(index, change):
    def make(args):
        return [change(x) if i == index else x for i, x in enumerate(args)]

    return make


BAD = {
    "rank": (bad(0, lambda g: g[0]), r"grad must be \[1, 7, 5, 9\], the output's shape, got \[7, 5, 9\]"),
    "channels": (bad(0, lambda g: g[:, :1]), r"grad must be \[1, 7, 5, 9\], .* got \[1, 1, 5, 9\]"),
    "rows": (bad(0, lambda g: g[:, :, :4]), r"grad must be \[1, 7, 5, 9\]"),
    "dtype": (
        bad(0, lambda g: g.double()),
        "grad must have the input's dtype, torch.float32, got torch.float64",
    ),
    "half": (
        bad(0, lambda g: g.half()),
        "grad must have the input's dtype, torch.float32, got torch.float16",
    ),
    "device": (bad(0, lambda g: g.to("meta")), "grad must be on the input's device, cpu, got meta"),
    "saved_shape": (bad(6, lambda y: y[..., :1]), r"saved must be \[1, 7, 5, 9\], .* got \[1, 7, 5, 1\]"),
    "saved_dtype": (bad(6, lambda y: y.double()), "saved must have the input's dtype"),
    "no_bias": (bad(5, lambda _: None), "needed must be False for the bias, which is None"),
    "input_shape": (bad(1, lambda x: x[:, :2]), "depthwise_weight must be"),
    "input_dtype": (bad(1, lambda x: x.double()), "input must have the weights' dtype"),
    "weight_dtype": (bad(3, lambda w: w.half()), "pointwise_weight must have the input's dtype"),
    "stride": (bad(7, lambda _: [0, 1]), "stride must be at least 1"),
}


@pytest.mark.parametrize("without_core", [False, True], ids=["native", "composed"])
@pytest.mark.parametrize("name", BAD)
def test_operator_refuses(name, without_core, monkeypatch):
    change, message = BAD[name]
    args = op_arguments("both_biases", act="relu", saved=True)
    if without_core:
        monkeypatch.setattr(_native, "core", None)
    with pytest.raises(RuntimeError, match=message):
        _backward.op(*change(args))
    _backward.op(*args)


def test_operator_of_the_half_names_its_own_arguments():
    args = op_arguments("both_biases", **HALF)
    assert len(_backward.depthwise_op(*args)) == 3
    with pytest.raises(RuntimeError, match=r"^weight must be \[C \* multiplier"):
        _backward.depthwise_op(*args[:2], args[2][:2], *args[3:])
    with pytest.raises(RuntimeError, match="needed must be False for the bias, which is None"):
        _backward.depthwise_op(*args[:3], None, *args[4:])
    with pytest.raises(RuntimeError, match=r"grad must be \[1, 3, 5, 9\]"):
        _backward.depthwise_op(args[0][:, :1], *args[1:])


VIEWS = {
    "odd_offset": lambda g: torch.cat([g.new_zeros(3), g.flatten()])[3:].view(g.shape),
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda g: g.contiguous(),
    "channel_slice": lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
    "every_second_column": lambda g: g.repeat_interleave(2, 3)[..., ::2],
    "reversed": lambda g: g.flip(1).transpose(0, 1).flip(0).transpose(0, 1),
    "permuted": lambda g: g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "one_number": lambda g: g[:1, :1, :1, :1].expand(g.shape),
    "one_image": lambda g: g[:1].expand(g.shape),
    "one_pixel": lambda g: g[:, :, :1, :1].expand(g.shape),
    "negated": lambda g: torch._neg_view(g),
    "zero_without_memory": lambda g: torch._efficientzerotensor(g.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", VIEWS)
def test_gradient_may_lie_anywhere(view, layout):
    """Its numbers count, not where they are: what sum() and slices hand on, too."""
    case = replace(BY_NAME["silu"], n=2, layout=layout)
    tensors = case.tensors()
    inputs = [tensor.requires_grad_() for tensor in tensors.values()]
    grad = VIEWS[view](case.gradient())
    dense = torch.zeros(case.output) + grad
    y = call(case, tensors)
    expected = torch.autograd.grad(
        y, inputs, dense.contiguous(memory_format=LAYOUTS[layout]), retain_graph=True
    )
    for got, want in zip(torch.autograd.grad(y, inputs, grad), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_eager_and_fake_gradients_have_one_format(name, depthwise):
    x = FORMATS[name]()
    c = x.shape[1]
    weights = torch.randn(c, 1, 3, 3), *(() if depthwise else (torch.randn(4, c, 1, 1), None)), None
    geometry = ([1, 1], [2, 1, 1, 1], [1, 1])
    grad = torch.randn(x.shape[0], c if depthwise else 4, x.shape[2] + 1, x.shape[3])
    if depthwise:
        args = grad, x, *weights, *geometry, "silu", [True, True, False]
    else:
        args = grad, x, *weights, None, *geometry, "silu", "silu", [True, True, True, False, False]
    eager = operator(args)(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = operator(args)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    for e, f in zip(eager, fake, strict=True):
        assert (e.shape, e.stride(), e.dtype) == (f.shape, f.stride(), f.dtype)


def test_fake_tensors_outside_their_mode():
    """Past the mode they are still no tensors with memory."""
    mode = torch._subclasses.FakeTensorMode()
    x, dw, pw = (
        mode.from_tensor(t).requires_grad_()
        for t in (torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3), torch.randn(3, 4, 1, 1))
    )
    y = fastsep.separable_conv2d(x, dw, pw, activation="relu")
    y.backward(torch.ones_like(y))
    assert x.grad.shape == x.shape
    assert type(x.grad) is type(x)


def test_flops():
    """Two of each half's; what is computed again is counted, as torch counts it for attention."""
    args = op_arguments("gelu_of_stride_and_multiplier")
    n, k, oh, ow = args[0].shape
    inner, _, kh, kw = args[2].shape
    depthwise, pointwise = 2 * n * oh * ow * inner * kh * kw, 2 * n * oh * ow * inner * k
    y = torch.empty_like(args[0])
    for saved, needed, expected in [
        (None, [True] * 3 + [False, True], 3 * depthwise + 3 * pointwise),
        (y, [True] * 3 + [False, True], 3 * depthwise + 2 * pointwise),
        (y, [False, False, True, False, False], depthwise + pointwise),
        (y, [False, True, False, False, False], 2 * depthwise + pointwise),
        (y, [False] * 4 + [True], 0),
    ]:
        with FlopCounterMode(display=False) as counter:
            _backward.op(*args[:6], saved, *args[7:-1], needed)
        assert counter.get_total_flops() == expected
    half_args = op_arguments("gelu_of_stride_and_multiplier", **HALF)
    with FlopCounterMode(display=False) as counter:
        _backward.depthwise_op(*half_args)
    assert counter.get_total_flops() == 3 * depthwise


@pytest.mark.parametrize("depthwise", [False, True])
def test_vmap(depthwise):
    args = op_arguments("both_biases", **(HALF if depthwise else {"act": "silu"}))
    run = operator(args)
    grads = torch.stack([args[0], 2 * args[0], args[0].flip(2)])
    weights = torch.stack([args[2], -args[2], args[2].flip(2)])
    got = torch.vmap(lambda g: run(g, *args[1:]))(grads)
    for i, grad in enumerate(grads):
        for g, e in zip(got, run(grad, *args[1:]), strict=True):
            assert torch.equal(g[i], e)
    got = torch.vmap(lambda g, w: run(g, args[1], w, *args[3:]), in_dims=(0, 0))(grads, weights)
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        for g, e in zip(got, run(grad, args[1], weight, *args[3:]), strict=True):
            assert torch.equal(g[i], e)


def test_operator_can_be_differentiated():
    args = op_arguments("both_biases", "float64", act="tanh", mid="silu")
    weights = [args[i].requires_grad_() for i in (0, 1, 2, 3)]

    def function(grad, x, dw, pw):
        return tuple(_backward.op(grad, x, dw, pw, *args[4:]))

    small = [weights[0][..., :1, :1], weights[1][..., :1, :1], *weights[2:]]
    assert torch.autograd.gradcheck(function, [t.detach().requires_grad_() for t in small])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_operator_of_a_dtype_without_kernels(dtype):
    args = op_arguments("both_biases", dtype, "nhwc", integers=1)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    for got, expected in zip(_backward.op(*args), _backward.op(*wide), strict=True):
        assert got.dtype == args[1].dtype
        torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
