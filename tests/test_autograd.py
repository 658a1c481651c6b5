"""Gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import BY_NAME, CASES, half
from torch.autograd import gradcheck, gradgradcheck

from fastsep import _ops
from fastsep._activations import ACTIVATIONS
from fastsep._case import format_case
from fastsep._check import NAMES, call, operands


def shrunk(case, taps=3):
    """A case with all that makes it another, in few numbers: finite differences take a call for each of them.

    Paddings stay on the sides where they were, and unequal where they were; kernels keep at most `taps` taps
    a side, strides and dilations at most 2 and 3; the plane has what gives two rows and columns, and three
    if it had them.
    """
    few = {"n": 2, "c": 2, "k": 2, "m": 2, "kh": taps, "kw": taps, "sh": 2, "sw": 3, "dh": 2, "dw": 3}
    few |= dict.fromkeys(("pt", "pl"), taps // 2) | dict.fromkeys(("pb", "pr"), taps // 2 + 1)
    small = replace(case, name="", **{key: min(getattr(case, key), most) for key, most in few.items()})
    h = small.dh * (small.kh - 1) + 1 + small.sh - small.pt - small.pb
    w = small.dw * (small.kw - 1) + 1 + small.sw - small.pl - small.pr
    return replace(small, h=min(case.h, max(3, h)), w=min(case.w, max(3, w)))


# Both halves, and the depthwise one of every other case alone; no image has no numbers. The kernels have
# loops of their own for 5 and 7 taps.
SMALL = list(dict.fromkeys(shrunk(case) for case in [*CASES, *map(half, CASES[::2])] if case.n))
for name, part in product(["stride_2_5x5", "seven_by_seven"], [lambda case: case, half]):
    SMALL.append(replace(shrunk(part(BY_NAME[name]), taps=7), n=1))


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
@pytest.mark.parametrize("case", SMALL, ids=format_case)
def test_finite_differences(case, layout, native_backward_calls):
    case = replace(case, dtype="float64", layout=layout)
    tensors = leaves(case)
    inputs = [tensor for tensor in tensors.values() if tensor is not None]

    def function(*numbers):
        given = iter(numbers)
        return call(case, {name: None if t is None else next(given) for name, t in tensors.items()})

    # First derivatives go by the kernels: every number of them is looked at. Forward mode, batched gradients,
    # which jacobians by torch.autograd use, and second derivatives go by composition: along one direction.
    assert gradcheck(function, inputs)
    assert native_backward_calls
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


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
