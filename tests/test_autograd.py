"""Gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import BY_NAME
from torch.autograd import gradcheck, gradgradcheck

from fastsep import _ops
from fastsep._activations import ACTIVATIONS
from fastsep._case import parse_case
from fastsep._check import NAMES, call, operands

# For finite differences, which take a call for every number that goes in.
SMALL = [
    "c=2 h=3 w=4 k=3 kh=1 kw=1 b=1",
    "c=2 h=4 w=3 k=2 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1 b=1 mid=relu act=relu6",
    "n=2 c=2 h=3 w=4 k=2 kh=2 kw=3 sh=1 sw=2 pb=1 pl=2 b=1 mid=relu6 act=relu",
    "c=1 h=5 w=4 k=2 m=3 kh=3 kw=2 dh=2 pt=1 pr=1 db=1 mid=leaky_relu act=leaky_relu",
    "c=2 h=5 w=5 k=2 m=2 kh=3 kw=3 sh=2 sw=2 pb=1 pr=1 db=1 b=1 mid=silu act=hardswish",
    "c=3 h=2 w=2 k=2 kh=2 kw=2 b=1 mid=hardswish act=silu",
    "c=2 h=3 w=3 k=2 kh=3 kw=1 pt=3 mid=hardsigmoid act=sigmoid",
    "c=2 h=1 w=2 k=3 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 mid=sigmoid act=hardsigmoid",
    "c=2 h=3 w=5 k=2 kh=1 kw=3 dw=2 pl=2 pr=1 db=1 b=1 mid=tanh act=gelu",
    "n=2 c=2 h=2 w=3 k=1 kh=2 kw=2 pt=1 mid=gelu act=gelu_tanh",
    "c=2 h=3 w=3 k=2 kh=2 kw=2 b=1 mid=gelu_tanh act=tanh",
    "c=2 h=4 w=5 k=0 m=2 kh=3 kw=3 sh=2 pt=1 pl=1 pr=2 db=1 mid=gelu",
    "n=2 c=3 h=3 w=4 k=0 kh=2 kw=3 dw=2 pl=2 pr=2 mid=relu6",
    "c=2 h=4 w=4 k=0 kh=3 kw=3 pt=1 pb=1 pl=1 pr=1 db=1",
]


def leaves(case, *needed):
    """The tensors of a case, those in `needed` with gradients; all without any."""
    tensors = case.tensors()
    for name in needed or NAMES:
        if tensors[name] is not None:
            tensors[name].requires_grad_()
    return tensors


def composed(case, tensors):
    geometry = ((case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw))
    return _ops.compose(*operands(tensors), *geometry, case.mid, case.act)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in forward mode
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("line", SMALL)
def test_finite_differences(line, layout, native_backward_calls):
    case = replace(parse_case(line), dtype="float64", layout=layout)
    tensors = leaves(case)
    inputs = [tensor for tensor in tensors.values() if tensor is not None]

    def function(*numbers):
        given = iter(numbers)
        return call(case, {name: None if t is None else next(given) for name, t in tensors.items()})

    # Forward mode, batched gradients, which jacobians by torch.autograd use, and second derivatives go by
    # composition, first ones by the kernels.
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert native_backward_calls
    assert gradgradcheck(function, inputs)


def test_finite_differences_know_every_activation():
    cases = [parse_case(line) for line in SMALL]
    assert {case.mid for case in cases} == {case.act for case in cases} == set(ACTIVATIONS)


@pytest.mark.parametrize("needed", [n for n in product([False, True], repeat=5) if any(n)], ids=str)
def test_every_subset_of_gradients(needed):
    case = replace(BY_NAME["gelu_of_stride_and_multiplier"], db=1, pb=3, dtype="float64")
    wanted = [name for name, need in zip(NAMES, needed, strict=True) if need]
    ours, theirs = leaves(case, *wanted), leaves(case, *wanted)
    call(case, ours).square().sum().backward()
    composed(case, theirs).square().sum().backward()
    for name in NAMES:
        if name in wanted:
            torch.testing.assert_close(ours[name].grad, theirs[name].grad)
        else:
            assert ours[name].grad is None


def test_no_graph_where_nothing_needs_it():
    case = BY_NAME["both_biases"]
    assert call(case, case.tensors()).grad_fn is None
    with torch.no_grad():
        assert call(case, leaves(case)).grad_fn is None
    with torch.inference_mode():
        y = call(case, leaves(case))
    assert y.is_inference()
    assert call(case, leaves(case)).grad_fn.name() == "SeparableConv2dFunctionBackward"


@pytest.mark.parametrize("view", ["unbatched", "empty", "expanded", "sliced"])
def test_gradients_through_views(view):
    case = replace(BY_NAME["both_biases"], n=2, dtype="float64")
    change = {
        "unbatched": lambda x: x[1],
        "empty": lambda x: x[:0],
        "expanded": lambda x: x[:, :1].expand(x.shape),
        "sliced": lambda x: torch.cat([x, x], 1)[:, 1:4].transpose(2, 3).contiguous().transpose(2, 3),
    }[view]
    ours, theirs = leaves(case), leaves(case)
    y = call(case, {**ours, "input": change(ours["input"])})
    x = change(theirs["input"])
    z = composed(case, {**theirs, "input": x.reshape(-1, *x.shape[-3:])})
    torch.testing.assert_close(y.view(z.shape), z)
    y.square().sum().backward()
    z.square().sum().backward()
    for name in NAMES:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def test_operator_has_the_gradient_itself():
    """Who calls it from an exported graph has no Function around it."""
    case = replace(BY_NAME["stride_2_tf_same"], dtype="float64", mid="silu", act="tanh")
    ours, theirs = leaves(case), leaves(case)
    x, dw, pw, db, b = operands(ours)
    geometry = (
        [case.sh, case.sw],
        [case.pt, case.pb, case.pl, case.pr],
        [case.dh, case.dw],
        case.mid,
        case.act,
    )
    torch.ops.fastsep.separable_conv2d(x, dw, pw, db, b, None, *geometry).square().sum().backward()
    composed(case, theirs).square().sum().backward()
    for name in NAMES:
        if ours[name] is not None:
            torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def test_backward_twice_and_through_the_gradient():
    case = replace(BY_NAME["both_biases"], dtype="float64", mid="silu")
    ours, theirs = leaves(case), leaves(case)
    for function, tensors in ((call, ours), (composed, theirs)):
        y = function(case, tensors)
        y.sum().backward(retain_graph=True)
        y.sum().backward(retain_graph=True)
        inputs = list(tensors.values())
        penalty = sum(
            g.square().sum() for g in torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        )
        penalty.backward()
    for name in NAMES:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def test_writing_to_what_was_saved_is_noticed():
    case = BY_NAME["both_biases"]
    tensors = leaves(case)
    y = call(case, tensors)
    with torch.no_grad():
        tensors["pointwise_weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradient_is_the_same_in_every_run():
    case = BY_NAME["mobilenet_v2_projection"]
    runs = []
    for _ in range(3):
        tensors = leaves(case)
        call(case, tensors).square().sum().backward()
        runs.append([tensor.grad for tensor in tensors.values()])
    for grads in zip(*runs, strict=True):
        assert torch.equal(grads[0], grads[1])
        assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_gradients_of_activations_at_their_edges(activation, again):
    """Where the slope jumps, at NaN and at large numbers the same as torch's."""
    points = [0.0, -0.0, 6.0, 3.0, -3.0, 1e-8, -1e-8, 2.5, -2.5, 30.0, -30.0, torch.nan]
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    g = torch.linspace(1, 2, len(points), dtype=torch.float64)
    function = ACTIVATIONS[activation]
    (expected,) = torch.autograd.grad(function.forward(x).mul(1), x, g, create_graph=again)
    with torch.set_grad_enabled(again):
        torch.testing.assert_close(function.backward(g, x), expected, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_writing_to_any_saved_tensor_is_noticed(name):
    case = BY_NAME["both_biases"]
    tensors = leaves(case)
    y = call(case, tensors)
    with torch.no_grad():
        tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_after_the_graph_is_freed():
    case = BY_NAME["both_biases"]
    y = call(case, leaves(case)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_mode():
    """It finds no fault with good gradients, and names the operator whose gradient is NaN."""
    case = BY_NAME["both_biases"]
    tensors = leaves(case)
    with torch.autograd.detect_anomaly():
        call(case, tensors).sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in tensors.values())
        with torch.no_grad():
            tensors["depthwise_weight"].fill_(torch.nan)
        y = call(case, tensors)
        with pytest.raises(RuntimeError, match=r"'SeparableConv2dFunctionBackward' returned nan values"):
            y.sum().backward()
