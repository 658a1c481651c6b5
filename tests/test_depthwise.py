"""The depthwise half by itself: the function, and the layer that is an nn.Conv2d."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, VARIETIES, WRONG, good_call, half, varied
from commands import run
from handwritten import X, layer, same
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize, prune

import fastsep
from fastsep import DepthwiseConv2d, SeparableConv2d, _native, _ops, functional
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


# The layer

ALIKE = {
    "plain": ({}, {}),
    "multiplier": ({"out_channels": 18}, {"out_channels": 18}),
    "padding": ({"padding": (2, 0)}, {"padding": (2, 0)}),
    "valid": ({"padding": "valid", "stride": 2}, {"padding": "valid", "stride": 2}),
    "same": ({"padding": "same", "dilation": (2, 3)}, {"padding": "same", "dilation": (2, 3)}),
    "strides": ({"stride": (1, 3), "bias": False}, {"stride": (1, 3), "bias": False}),
    "groups": ({"groups": 6}, {}),
    "reflect": ({"padding": 2, "padding_mode": "reflect"}, {"padding": 2, "padding_mode": "reflect"}),
    "circular": (
        {"padding": "same", "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "circular"},
    ),
    "double": ({"dtype": torch.float64}, {"dtype": torch.float64}),
}


def depthwise(seed=0, **options):
    torch.manual_seed(seed)
    return DepthwiseConv2d(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3} | options)


def conv(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Conv2d(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6} | options)


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_is_a_convolution(name, activation):
    """From the same seed: weights, keys, attributes, what is printed, results and gradients."""
    ours, theirs = depthwise(**ALIKE[name][0], activation=activation), conv(**ALIKE[name][1])
    act = ACTIVATIONS[activation or "identity"].forward
    assert isinstance(ours, nn.Conv2d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for attribute in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    shown = repr(theirs) if activation is None else f"{repr(theirs)[:-1]}, activation={activation!r})"
    assert repr(ours) == f"Depthwise{shown}"
    for x in (X, X.contiguous(memory_format=torch.channels_last), X[0], X[:0]):
        x = x.to(theirs.weight.dtype)
        same(ours(x), act(theirs(x)))
        grads = [
            torch.autograd.grad(y.square().sum(), list(module.parameters()))
            for module, y in ((ours, ours(x)), (theirs, act(theirs(x))))
        ]
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_positional_arguments_are_those_of_nn_conv2d():
    args = (6, 12, (3, 2), 2, 1, (1, 2), 6, False, "zeros", "cpu", torch.float64)
    ours, theirs = DepthwiseConv2d(*args), nn.Conv2d(*args)
    assert repr(ours) == f"Depthwise{theirs!r}"
    assert ours.weight.dtype == torch.float64
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(
        ours(X.double()), fastsep.depthwise_conv2d(X.double(), theirs.weight, None, 2, 1, (1, 2))
    )


@pytest.mark.parametrize(
    ("padding", "stride", "pads"),
    [(((1, 0), (3, 2)), 1, (3, 2, 1, 0)), ("same", 2, (0, 1, 1, 1)), ("same", (2, 1), (1, 1, 1, 1))],
)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_padding_that_nn_conv2d_has_not(padding, stride, pads, mode):
    ours, theirs = depthwise(padding=padding, stride=stride, padding_mode=mode), conv(stride=stride)
    padded = F.pad(X, pads, "constant" if mode == "zeros" else mode)
    same(ours(X), theirs(padded))
    assert ours.padding == padding
    assert re.search(rf"padding={re.escape(str(padding))}\b|padding=\(\(1, 0\), \(3, 2\)\)", repr(ours))


CONSTRUCTORS = [
    ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
    ({"out_channels": 6.0}, TypeError, "out_channels must be an int, got 6.0"),
    ({"out_channels": 9}, ValueError, "out_channels must be a multiple of in_channels, 6, got 9"),
    ({"out_channels": 3}, ValueError, "out_channels must be a multiple of in_channels, 6, got 3"),
    ({"groups": 1}, ValueError, "groups must be None or in_channels, 6, got 1"),
    ({"groups": 3}, ValueError, "groups must be None or in_channels, 6, got 3"),
    ({"kernel_size": 0}, ValueError, r"kernel_size must be at least 1, got \(0, 0\)"),
    ({"stride": None}, TypeError, "stride must be an int or a pair of ints, got None"),
    ({"dilation": -1}, ValueError, "dilation must be at least 1"),
    ({"padding": ((0, 0), (0, -2))}, ValueError, "padding must be at least 0"),
    ({"padding": "full"}, ValueError, 'padding must be "valid" or "same".*full'),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode"),
    ({"activation": "swish"}, ValueError, "activation must be None or one of relu"),
]


@pytest.mark.parametrize(("change", "error", "message"), CONSTRUCTORS)
def test_constructor_refuses(change, error, message):
    with pytest.raises(error, match=message):
        depthwise(**change)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X[:, :3], RuntimeError, r"input must have 6 channels, got \[2, 3, 11, 10\]"),
        (X[0, 0], RuntimeError, r"input must be \[N, C, H, W\] or \[C, H, W\]"),
        (X.double(), RuntimeError, "weight must have the input's dtype"),
        (X.tolist(), TypeError, "input must be a Tensor, got list"),
    ],
)
def test_call_refuses(x, error, message):
    with pytest.raises(error, match=message):
        depthwise()(x)


def test_attributes_may_change_later():
    changed, theirs = depthwise(padding="same", stride=2), conv(stride=2)
    changed.stride = theirs.stride = 1
    changed.padding = theirs.padding = (2, 1)
    same(changed(X), theirs(X))
    changed.activation = "relu"
    assert changed(X).min() == 0
    changed.activation = "nonsense"
    with pytest.raises(ValueError, match="activation must be"):
        changed(X)


class Times(nn.Module):
    def forward(self, x):
        return 5 * x


CHANGES = {
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Times()),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.eval()),
    "weight_norm": lambda m: parametrizations.weight_norm(m),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned_for_good": lambda m: prune.remove(prune.l1_unstructured(m, "weight", 0.5), "weight"),
    "forward_hook": lambda m: m.register_forward_hook(lambda _m, _x, y: y + 1),
    "pre_hook": lambda m: m.register_forward_pre_hook(lambda _m, x: (x[0] * 2,)),
    "no_bias": lambda m: setattr(m, "bias", None),
    "data": lambda m: m.weight.data.mul_(3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_done_to_convolutions_works(name):
    results = []
    for module in (depthwise(padding=1), conv(padding=1)):
        torch.manual_seed(5)
        CHANGES[name](module)
        x = X.clone().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_backward_hooks_run():
    module, calls = depthwise(activation="silu"), []
    module.register_full_backward_hook(lambda *args: calls.append(args[0]))
    module(X.clone().requires_grad_()).sum().backward()
    assert calls == [module]


def test_copies_and_files():
    module = depthwise(padding="same", stride=2, activation="gelu")
    expected = module(X)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(X), expected)
        assert repr(twin) == repr(module)


def test_takes_the_native_path(native_calls, native_backward_calls):
    module = depthwise(activation="relu")
    with torch.no_grad():
        module(X)
    assert len(native_calls) == 1
    y = module(X)
    assert y.grad_fn.name() == "DepthwiseConv2dFunctionBackward"
    y.sum().backward()
    assert (len(native_calls), len(native_backward_calls)) == (2, 1)


# As a child of the separable layer


def test_separable_layer_fuses_it(native_calls):
    ours, theirs = layer(6, 5, 3, mid_activation="relu"), layer(6, 5, 3, mid_activation="relu")
    for padding, stride in ((0, 1), (1, 2), (((1, 0), (3, 2)), 1), ("same", 2)):
        theirs = layer(6, 5, 3, stride, padding, mid_activation="relu")
        ours.depthwise = depthwise(padding=padding, stride=stride, bias=False)
        ours.depthwise.load_state_dict(theirs.depthwise.state_dict())
        native_calls.clear()
        with torch.no_grad():
            assert torch.equal(ours(X), theirs(X))
        assert len(native_calls) == 2


@pytest.mark.parametrize("what", ["activation", "hook", "own_padding"])
def test_separable_layer_calls_it(what, native_calls):
    """With something of its own it is a call of its own."""
    ours = layer(6, 5, 3, padding=((1, 0), (0, 1)) if what == "own_padding" else 0)
    options = {"activation": {"activation": "silu"}, "own_padding": {"padding": 1}}.get(what, {})
    ours.depthwise = depthwise(**options)
    if what == "hook":
        ours.depthwise.register_forward_hook(lambda _m, _x, y: 2 * y)
    x = F.pad(X, (0, 1, 1, 0)) if what == "own_padding" else X
    with torch.no_grad():
        expected = ours.pointwise(ours.depthwise(x))
        native_calls.clear()
        assert torch.equal(ours(X), expected)
    assert len(native_calls) == 1


def test_parametrized_child_is_fused(native_calls):
    ours = SeparableConv2d(6, 5, 3)
    ours.depthwise = depthwise(bias=False)
    parametrize.register_parametrization(ours.depthwise, "weight", Times())
    with torch.no_grad():
        got = ours(X)
        assert len(native_calls) == 1
        same(got, ours.pointwise(ours.depthwise(X)))


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
