"""Which path computes what, native code or torch's operators, and what is said of it."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import ClassVar

import pytest
import torch
from cases import BY_NAME, CASES, VARIETIES, varied
from commands import run
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastsep
from fastsep import SeparableConv2d, _native, _ops, functional
from fastsep._activations import ACTIVATIONS
from fastsep._case import Case, case_of, format_case, parse_case

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")
X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(1))


def layer(**options):
    torch.manual_seed(0)
    return SeparableConv2d(6, 7, 3, **{"padding": 1, "mid_activation": "relu6"} | options)


def two_convolutions(module, x):
    return module._call_children(x)


class Subclass(Tensor):
    pass


class Overridden(Tensor):
    """Counts what it is asked to do."""

    asked: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.asked.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


PATHS = {
    "float32": (lambda t: t, ""),
    "float64": (lambda t: t.double(), ""),
    "parameter": (lambda t: nn.Parameter(t), ""),
    "float16": (lambda t: t.half(), "no native kernel for torch.float16"),
    "bfloat16": (lambda t: t.bfloat16(), "no native kernel for torch.bfloat16"),
    "complex": (lambda t: t.to(torch.complex64), "no native kernel for torch.complex64"),
    "meta": (lambda t: t.to("meta"), "no native kernel for meta"),
    "subclass": (lambda t: t.as_subclass(Subclass), "tensor subclass Subclass"),
}


@needs_native
@pytest.mark.parametrize("name", PATHS)
def test_path(name):
    convert, reason = PATHS[name]
    x, *weights = (convert(t) for t in (X, torch.randn(6, 1, 3, 3), torch.randn(7, 6, 1, 1), torch.randn(6)))
    assert functional.why_composed(x, *weights, None) == reason
    assert functional.why_composed(x, *weights, weights[-1]) == reason
    y = fastsep.separable_conv2d(x, *weights[:2], depthwise_bias=weights[2])
    z = _ops.compose(x, *weights, None, (1, 1), (0,) * 4, (1, 1), "identity", "identity")
    assert (y.dtype, y.device, y.shape, type(y)) == (z.dtype, z.device, z.shape, type(z))
    if name != "meta":
        torch.testing.assert_close(y, z)


@needs_native
def test_path_of_one_weight_elsewhere():
    """Native code gets no address that is not one."""
    args = [X, torch.randn(6, 1, 3, 3), torch.randn(7, 6, 1, 1), torch.randn(6), torch.randn(7)]
    assert not functional.why_composed(*args)
    for i in range(1, 5):
        odd = [*args[:i], args[i].to("meta"), *args[i + 1 :]]
        assert functional.why_composed(*odd)
        with pytest.raises(RuntimeError, match=r"must be on the input's device, cpu, got meta"):
            functional.dispatch(*odd, None, (1, 1), (1, 1, 1, 1), (1, 1), "identity", "identity")
        with pytest.raises(RuntimeError, match=r"must be on the input's device, cpu, got meta"):
            torch.ops.fastsep.separable_conv2d(*odd, None, [1, 1], [1] * 4, [1, 1], "identity", "identity")


@needs_native
def test_path_under_autocast_and_forward_mode():
    args = X, torch.randn(6, 1, 3, 3), torch.randn(7, 6, 1, 1), None, None
    with torch.autocast("cpu"):
        assert functional.why_composed(*args) == "autocast"
    with forward_ad.dual_level():
        assert functional.why_composed(*args) == "forward-mode derivative"
    assert functional.why_composed(*args) == ""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_mkldnn_tensors():
    module = layer()
    with torch.no_grad():
        dense = [
            module.depthwise.weight.detach(),
            module.pointwise.weight.detach(),
            module.pointwise.bias.detach(),
        ]
        y = fastsep.separable_conv2d(X.to_mkldnn(), *(weight.to_mkldnn() for weight in dense))
        torch.testing.assert_close(y.to_dense(), fastsep.separable_conv2d(X, *dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu6", "gelu", None])
def test_autocast_is_that_of_two_convolutions(dtype, activation):
    """To the bit, gradients too: it is the same two calls."""
    results = []
    for function in (lambda m, x: m(x), two_convolutions):
        module, x = layer(mid_activation=activation, depthwise_bias=True), X.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = function(module, x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_autocast_unites_dtypes():
    module = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(X.bfloat16()).dtype == torch.bfloat16
        assert module(X).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="input must have the weights' dtype"):
        module(X.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["both_biases", "stride_2_tf_same", "multiplier_3", "silu", "gelu_tanh"])
def test_half_precision_errs_no_more_than_torch(name, dtype):
    """At most twice the error that two convolutions in that precision make."""
    case = dataclasses.replace(BY_NAME[name], dtype=str(dtype)[6:])
    tensors = case.tensors()
    x, dw, pw, b, db = tensors.values()
    geometry = (
        (case.sh, case.sw),
        (case.pt, case.pb, case.pl, case.pr),
        (case.dh, case.dw),
        case.mid,
        case.act,
    )

    def composed(dtype):
        cast = [None if t is None else t.to(dtype) for t in (x, dw, pw, db, b)]
        return _ops.compose(*cast, *geometry).double()

    y, exact, theirs = (
        fastsep.separable_conv2d(**tensors, **case.options),
        composed(torch.float64),
        composed(dtype),
    )
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 2 * (theirs - exact).abs().max() + torch.finfo(dtype).eps


def test_complex():
    """By hand: a convolution is linear, so it is that of the parts."""
    x, dw, pw = (torch.randn(s, dtype=torch.complex128) for s in ((2, 3, 6, 5), (6, 1, 3, 3), (4, 6, 1, 1)))

    def real(x, dw, pw):
        return fastsep.separable_conv2d(
            x.contiguous(), dw.contiguous(), pw.contiguous(), padding=((1, 0), (2, 1))
        )

    parts = {}
    for i, u in enumerate((x.real, x.imag)):
        for j, v in enumerate((dw.real, dw.imag)):
            for k, w in enumerate((pw.real, pw.imag)):
                parts[i + j + k] = parts.get(i + j + k, 0) + real(u, v, w)
    expected = torch.complex(parts[0] - parts[2], parts[1] - parts[3])
    torch.testing.assert_close(fastsep.separable_conv2d(x, dw, pw, padding=((1, 0), (2, 1))), expected)


def test_views_with_the_negative_bit():
    """The imaginary part of a conjugate is stored with the other sign."""
    z = torch.randn(2, 6, 5, 5, dtype=torch.complex64)
    weights = [
        t.conj().imag
        for t in (torch.randn(6, 1, 3, 3) * 1j, torch.randn(7, 6, 1, 1) * 1j, torch.randn(7) * 1j)
    ]
    assert all(t.is_neg() for t in weights)
    dense = [t.resolve_neg().clone() for t in weights]
    for x in (z.conj().imag, z.imag):
        expected = fastsep.separable_conv2d(x.resolve_neg().clone(), *dense)
        torch.testing.assert_close(fastsep.separable_conv2d(x, *weights), expected)
    x = x.clone()
    for i in range(3):
        one = [*dense[:i], weights[i], *dense[i + 1 :]]
        torch.testing.assert_close(fastsep.separable_conv2d(x, *one), expected)
    bias = torch.randn(6, dtype=torch.complex64).conj().imag
    expected = fastsep.separable_conv2d(x, *dense, depthwise_bias=bias.resolve_neg().clone())
    torch.testing.assert_close(fastsep.separable_conv2d(x, *dense, depthwise_bias=bias), expected)


def test_torch_function_is_asked():
    x = X.as_subclass(Overridden)
    Overridden.asked.clear()
    y = fastsep.separable_conv2d(
        x, torch.randn(6, 1, 3, 3), torch.randn(7, 6, 1, 1), stride=2, activation="relu"
    )
    assert Overridden.asked[0] is fastsep.separable_conv2d
    assert type(y) is Overridden
    module = layer()
    torch.testing.assert_close(module(x).as_subclass(Tensor), module(X), rtol=1e-4, atol=1e-5)


def test_function_mode_sees_the_operator():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode(), torch.no_grad():
        layer()(X)
    assert torch.ops.fastsep.separable_conv2d.default in seen


def test_dispatch_mode_sees_the_operator():
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode(), torch.no_grad():
        layer()(X)
    assert torch.ops.fastsep.separable_conv2d.default in seen


@pytest.mark.parametrize("variety", VARIETIES, ids="-".join)
def test_every_number_of_the_output_is_written(variety):
    """torch.empty() gives NaN in this mode."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        for case in CASES:
            case = varied(case, *variety)
            assert not fastsep.separable_conv2d(**case.tensors(), **case.options).isnan().any(), format_case(
                case
            )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_values_without_the_native_module(case, monkeypatch):
    expected = fastsep.separable_conv2d(**case.tensors(), **case.options)
    monkeypatch.setattr(_native, "core", None)
    got = fastsep.separable_conv2d(**case.tensors(), **case.options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    operator = torch.ops.fastsep.separable_conv2d
    x, dw, pw, b, db = case.tensors().values()
    geometry = (
        [case.sh, case.sw],
        [case.pt, case.pb, case.pl, case.pr],
        [case.dh, case.dw],
        case.mid,
        case.act,
    )
    assert torch.equal(operator(x, dw, pw, db, b, None, *geometry), got)


# Lines that describe a case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lines_are_read_back(case):
    assert parse_case(format_case(case)) == case
    odd = dataclasses.replace(case, name="", dtype="float64", layout="nhwc")
    assert parse_case(format_case(odd) + "  # of some network") == odd
    pads, order = (case.pt, case.pb, case.pl, case.pr), ("input", "depthwise_weight", "pointwise_weight")
    tensors = case.tensors()
    x, dw, pw = (tensors[name] for name in order)
    of_call = case_of(
        *(
            x,
            dw,
            pw,
            tensors["depthwise_bias"],
            tensors["bias"],
            (case.sh, case.sw),
            pads,
            (case.dh, case.dw),
        ),
        *(case.mid, case.act),
        nhwc=False,
    )
    assert of_call == dataclasses.replace(case, name="")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c=1 h=1 w=1 k=1 kh=1", "kw missing"),
        ("c=1 h=1 w=1 k=1 kh=1 kw=1 c=2", "c is given twice"),
        ("c=1 h=1 w=1 k=1 kh=1 kw=1 zz=2", "expected key=value with one of .* got 'zz=2'"),
        ("c=1 h=1 w=1 k=1 kh=1 kw=1 relu", "got 'relu'"),
        ("c=1 h=1 w=1 k=1 kh=1 kw=-1", "kw must be a whole number, got '-1'"),
        ("c=1 h=1 w=1 k=1 kh=1 kw=1 mid=swish", "mid must be one of identity, relu,.* got 'swish'"),
        ("c=1 h=1 w=1 k=1 kh=1 kw=1 layout=chwn", "layout must be one of nchw, nhwc"),
        ("c=1 h=1 w=1 k=0 kh=1 kw=1 b=1", "b and act must be left out with k=0"),
        ("c=1 h=1 w=1 k=0 kh=1 kw=1 act=relu", "b and act must be left out with k=0"),
        ("", "missing"),
    ],
)
def test_wrong_lines(line, message):
    with pytest.raises(ValueError, match=message):
        parse_case(line)


def test_table_of_cases():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 60
    assert all(names)
    assert all(case.oh > 0 and case.ow > 0 for case in CASES)
    assert {case.mid for case in CASES} == {case.act for case in CASES} == set(ACTIVATIONS)
    assert all(case.dtype == "float32" and case.layout == "nchw" for case in CASES)  # the tests' to choose


VERBOSE_PROGRAM = """
import torch, fastsep
x, dw, pw, b = torch.randn(2, 4, 7, 6), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1), torch.randn(5)
options = dict(stride=(2, 1), padding=((1, 0), (2, 1)), mid_activation="relu6")
fastsep.separable_conv2d(x, dw, pw, b, **options)
y = x.double().contiguous(memory_format=torch.channels_last)
fastsep.separable_conv2d(y, dw.double(), pw.double(), **options)
fastsep.separable_conv2d(x[0].bfloat16(), dw.bfloat16(), pw.bfloat16(), activation="silu")
fastsep.SeparableConv2d(4, 4, 3).freeze()(x)
torch.compile(fastsep.separable_conv2d, backend="eager")(x, dw, pw)
fastsep.separable_conv2d(x, dw.requires_grad_(), pw).sum().backward()
fastsep.depthwise_conv2d(x.requires_grad_(), dw, stride=2, activation="silu").sum().backward()
"""


@needs_native
def test_verbose_lines():
    result = run(f"{sys.executable} -c '{VERBOSE_PROGRAM}'", FASTSEP_VERBOSE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 9, result.stderr
    isa = _native.core.best_isa()
    expected = [
        (rf"native {isa} \| weights packed for this call, torch threads", "b=1 mid=relu6"),
        (
            rf"native {isa} \| weights packed for this call, torch threads",
            "mid=relu6 dtype=float64 layout=nhwc",
        ),
        (r"composition \| no native kernel for torch.bfloat16", "act=silu dtype=bfloat16"),
        (rf"native {isa} \| weights frozen, torch threads", "b=1"),
        (rf"native {isa} \| weights packed for this call, torch threads", ""),
        (rf"native {isa} \| weights packed for this call, torch threads", ""),
        (rf"backward native {isa} \| gradients of depthwise_weight, torch threads", ""),
        (rf"native {isa} \| weights packed for this call, torch threads", "k=0 .* mid=silu"),
        (rf"backward native {isa} \| gradients of input, weight, torch threads", "k=0 .* mid=silu"),
    ]
    for line, (path, end) in zip(lines, expected, strict=True):
        assert re.fullmatch(rf"fastsep: {path} \| \d+\.\d{{3}} ms \| c=4 .*{end}", line)
    first = Case(c=4, h=7, w=6, k=5, kh=3, kw=3, n=2, m=2, sh=2, pt=1, pl=2, pr=1, b=1, mid="relu6")
    assert parse_case(lines[0]) == first
    assert parse_case(lines[1]) == dataclasses.replace(first, b=0, dtype="float64", layout="nhwc")
    assert parse_case(lines[2]).n == 1
    assert parse_case(lines[8]) == Case(c=4, h=7, w=6, k=0, kh=3, kw=3, n=2, m=2, sh=2, sw=2, mid="silu")


@pytest.mark.parametrize("value", ["", "0"])
def test_silent_without_the_variable(value):
    program = "".join(line for line in VERBOSE_PROGRAM.splitlines(True) if "compile" not in line)
    result = run(f"{sys.executable} -c '{program}'", FASTSEP_VERBOSE=value)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
