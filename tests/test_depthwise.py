"""The depthwise half by itself: the function, and what torch's transforms and the commands make of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, VARIETIES, WRONG, good_call, half, varied
from commands import run
from handwritten import X, depthwise, layer, same
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastsep
from fastsep import _native, _ops, functional
from fastsep.__main__ import main
from fastsep._activations import ACTIVATIONS
from fastsep._case import format_case, parse_case
from fastsep._check import (
    call,
    error_bound,
    operands,
    oracle,
    relative_error,
    run_native,
)

# torch's own, inside its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


def by_torch(case, tensors):
    x, dw, _, db, _ = operands(tensors)
    x = F.pad(x, (case.pl, case.pr, case.pt, case.pb))
    t = F.conv2d(x, dw, db, (case.sh, case.sw), 0, (case.dh, case.dw), case.c)
    return ACTIVATIONS[case.mid].forward(t)


# The function


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_on_the_table(case):
    for dtype, layout in VARIETIES:
        one = varied(half(case), dtype, layout)
        tensors = one.tensors()
        exact, bound = oracle(one, tensors), error_bound(one, oracle(one, tensors, magnitude=True))
        assert relative_error(by_torch(one, tensors), exact, bound) <= 1
        for isa in _native.core.isas():
            error = relative_error(run_native(one, tensors, isa), exact, bound)
            assert error <= 1, f"{error:.3g} times its bound on {isa}: {format_case(one)}"
        got = call(one, tensors)
        assert torch.equal(got, run_native(one, tensors)), format_case(one)
        assert got.is_contiguous(memory_format=_ops.memory_format(tensors["input"]))


def test_same_values_without_the_native_module(monkeypatch):
    for case in map(half, CASES):
        expected = call(case, case.tensors())
        with monkeypatch.context() as patch:
            patch.setattr(_native, "core", None)
            torch.testing.assert_close(call(case, case.tensors()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (lambda t: t, ""),
        (lambda t: t.double(), ""),
        (lambda t: nn.Parameter(t), ""),
        (lambda t: t.half(), "no native kernel for torch.float16"),
        (lambda t: t.bfloat16(), "no native kernel for torch.bfloat16"),
        (lambda t: t.to("meta"), "no native kernel for meta"),
    ],
)
def test_path(convert, reason):
    x, w, b = map(convert, (X, torch.randn(12, 1, 3, 3), torch.randn(12)))
    assert functional.why_composed(x, w, None, b, None) == reason
    y = fastsep.depthwise_conv2d(x, w, b, padding=1, activation="relu")
    z = F.relu(F.conv2d(x, w, b, padding=1, groups=6))
    assert (y.dtype, y.device, y.shape, type(y)) == (z.dtype, z.device, z.shape, type(z))
    if not x.is_meta:
        torch.testing.assert_close(y, z)


def test_views_and_one_image():
    w = torch.randn(6, 1, 3, 3)
    for x in (X[0], X[:, :, ::2, 1:], X.transpose(2, 3), X[:1].expand(3, -1, -1, -1), torch._neg_view(X)):
        dense = x.clone(memory_format=torch.contiguous_format)
        same(fastsep.depthwise_conv2d(x, w), F.conv2d(dense, w, groups=6))


# What is wrong in separable_conv2d is wrong here, under the names of the arguments here.
RENAMED = {"depthwise_weight": "weight", "depthwise_bias": "bias", "mid_activation": "activation"}
WRONG_HERE = [
    wrong for wrong in WRONG if not wrong.change.keys() & {"pointwise_weight", "bias", "activation"}
]


def renamed(arguments):
    return {RENAMED.get(name, name): value for name, value in arguments.items()}


@pytest.mark.parametrize("wrong", WRONG_HERE, ids=lambda wrong: wrong.name)
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_call(wrong, grad):
    good = {name: value for name, value in good_call().items() if name not in ("pointwise_weight", "bias")}
    message = wrong.message
    for theirs, ours in RENAMED.items():
        message = message.replace(theirs, ours)
    good["depthwise_weight"].requires_grad_(grad)
    with pytest.raises(wrong.error, match=f"(?<!depthwise_)(?<!mid_){message}"):
        fastsep.depthwise_conv2d(**renamed({**good, **wrong.change}))
    assert fastsep.depthwise_conv2d(**renamed(good)).shape == (2, 8, 4, 3)


def test_weights_may_not_be_missing():
    with pytest.raises(TypeError, match=r"^weight must be a Tensor, got NoneType"):
        fastsep.depthwise_conv2d(X, None)
    broken = layer()
    broken.pointwise.weight = None
    with pytest.raises(TypeError, match="conv2d"):  # torch's, of the child
        broken(X)


class Overridden(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is fastsep.depthwise_conv2d:
            return "asked", kwargs
        return super().__torch_function__(function, types, args, kwargs or {})


def test_torch_function_is_asked():
    y = fastsep.depthwise_conv2d(X, torch.randn(6, 1, 3, 3).as_subclass(Overridden), activation="relu")
    assert y == ("asked", {"activation": "relu"})


# Transforms


def test_compile_export_and_traces():
    torch._dynamo.reset()
    for options in ({}, {"padding": "same", "stride": 2, "activation": "silu"}):
        module = depthwise(**options)
        expected = module(X)
        counter = CompileCounterWithBackend("aot_eager")
        assert torch.equal(torch.compile(module, backend=counter, fullgraph=True)(X), expected)
        nodes = [node.target for graph in counter.graphs for node in graph.graph.nodes]
        assert nodes.count(_ops.depthwise_op) == 1
        program = torch.export.export(module, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [_ops.depthwise_op]
        assert torch.equal(program.module()(X), expected)
        traced = torch.fx.symbolic_trace(nn.Sequential(module, nn.ReLU()))
        assert fastsep.depthwise_conv2d in {node.target for node in traced.graph.nodes}
        same(traced(X), expected.relu())


def test_jit_trace():
    module = depthwise(padding=1, stride=2, activation="silu")
    same(torch.jit.trace(module, (X,))(X[:1]), module(X[:1]))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_and_func(requires_grad):
    module = depthwise(activation="gelu").requires_grad_(requires_grad)
    x = torch.randn(3, *X.shape)
    same(torch.vmap(module)(x), torch.stack([module(batch) for batch in x]))
    weights = torch.randn(3, 6, 1, 3, 3, requires_grad=requires_grad)
    got = torch.vmap(fastsep.depthwise_conv2d)(x, weights)
    same(got, torch.stack([fastsep.depthwise_conv2d(b, w) for b, w in zip(x, weights, strict=True)]))
    got = torch.func.grad(lambda w: fastsep.depthwise_conv2d(X, w).square().sum())(weights[0])
    y = F.conv2d(X, weights[0].detach().requires_grad_(), groups=6)
    (expected,) = torch.autograd.grad(y.square().sum(), y.grad_fn.next_functions[1][0].variable)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad):
    dtype = getattr(torch, dtype)
    x = X.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)
    weight, bias = torch.randn(12, 1, 3, 3, dtype=dtype), torch.randn(12, dtype=dtype)
    args = x, weight, bias, [2, 1], [1, 0, 2, 1], [1, 1], "silu"
    torch.library.opcheck(_ops.depthwise_op, args)


def test_autocast():
    module = depthwise(activation="relu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = module(X), F.relu(F.conv2d(X, module.weight, module.bias, groups=6))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, z)


def test_flops():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = fastsep.depthwise_conv2d(X, torch.randn(12, 1, 5, 2))
    assert counter.get_total_flops() == 2 * y.numel() * 5 * 2


# Lines


@needs_native
def test_replay_of_a_verbose_line(tmp_path):
    program = "import torch, fastsep; fastsep.DepthwiseConv2d(3, 6, (3, 2), 2, activation='gelu')"
    program += "(torch.ones(2, 3, 9, 8, requires_grad=True)).sum().backward()"
    result = run(f'python -c "{program}"', cwd=tmp_path, FASTSEP_VERBOSE="1")
    for line, backward in zip(result.stderr.splitlines(), (False, True), strict=True):
        command = [sys.executable, "-m", "fastsep", "replay", line, "--seconds", "0"]
        replayed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert replayed.returncode == 0, replayed.stderr
        printed = dict(text.split(maxsplit=1) for text in replayed.stdout.splitlines())
        assert printed["case"] == "c=3 h=9 w=8 k=0 kh=3 kw=2 n=2 m=2 sh=2 sw=2 db=1 mid=gelu"
        assert printed["path"].startswith("backward native" if backward else "native")
        assert 0 < float(printed["error"].split()[0]) <= 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("k", [0, 5])
def test_replay_of_gradients(dtype, k, capsys):
    line = f"c=6 h=7 w=8 k={k} kh=3 kw=3 db=1 mid=silu dtype={dtype}"
    assert main(["replay", "--backward", line, "--seconds", "0"]) == 0
    assert "path   backward" in capsys.readouterr().out


def test_replay_of_gradients_that_torch_has_not(capsys):
    assert main(["replay", "--backward", "c=6 h=7 w=8 k=5 kh=3 kw=3 dtype=complex64"]) == 2
    assert "the dtype must be real" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_lines_are_read_back(case):
    case = half(case)
    assert parse_case(format_case(case)) == case
    x, w, _, b, _ = operands(case.tensors())
    assert case.output == tuple(call(case, case.tensors()).shape)
    assert (x.shape[1] * case.m, b is not None) == (w.shape[0], bool(case.db))


@pytest.mark.parametrize("phase", ["forward", "training"])
def test_bench_measures_a_depthwise_half(phase, tmp_path, capsys):
    """Against the one convolution of torch's, with outputs verified before."""
    (tmp_path / "network.txt").write_text(format_case(half(BY_NAME["both_biases"])))
    network = ["--network", str(tmp_path / "network.txt")]
    assert main(["bench", *network, "--phase", phase, "--seconds", "0.05", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert {"torch nhwc", "torch nchw", "fastsep"} <= row["times"].keys()
    assert all(times["median"] > 0 for times in row["times"].values())
