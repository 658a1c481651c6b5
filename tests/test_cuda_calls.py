"""How calls on a GPU are computed, without one: the kernels for the CPU stand in for those for CUDA."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, half
from commands import run
from cuda_stand_in import backward, forward
from gpu_cases import every_case, geometry, layouts, parts, present

from fastsep import _backward, _cuda_kernels, _cuda_paths, _native, _ops, _plan
from fastsep._case import Case, format_case, parse_case
from fastsep._check import (
    NAMES,
    call,
    error_bound,
    gradient_bounds,
    largest_error,
    operands,
    oracle,
    oracle_backward,
    relative_error,
)
from fastsep._cuda_model import ADDMM, ADDMM_RELU, CUDNN_RELU, DEPTHWISE, FUSED, HOPPER, TORCH

allows_tf32 = _cuda_paths.allows_tf32


def case_format(case):
    return _ops.memory_format(case.tensors()["input"])


@every_case
@parts
@layouts
def test_every_path_forward(on_host, case, part, layout):
    case = replace(part(case), layout=layout)
    tensors = case.tensors()
    exact, bound = oracle(case, tensors), error_bound(case, oracle(case, tensors, magnitude=True))
    for path in (FUSED, DEPTHWISE, ADDMM, TORCH):
        with _plan.force(path):
            got = forward(case, tensors)
        assert relative_error(got, exact, bound) <= 1, f"{path}: {format_case(case)}"
        assert got.is_contiguous(memory_format=case_format(case))
    expected = ["forward", "depthwise forward"] if case.k else ["depthwise forward"]
    assert on_host.calls[: len(expected)] == (expected if case.n not in (0, 33) else [])


@every_case
@parts
def test_every_path_backward(on_host, case, part):
    case = replace(part(case), layout="nhwc" if case.c % 2 else "nchw")
    tensors, grad = case.tensors(), case.gradient()
    exact, bounds = oracle_backward(case, tensors, grad), gradient_bounds(case, tensors, grad)
    y = _ops.run(*operands(tensors), None, *geometry(case))
    keeps = _native.core.derivative_from_output(_ops.ACTIVATIONS[case.act].code) and case.act != "identity"
    for path in (FUSED, DEPTHWISE, TORCH):
        for saved in [None, y] if keeps else [None]:
            with _plan.force(path):
                got = backward(case, tensors, saved=saved)
            formats = [case_format(case)] + [torch.contiguous_format] * 4
            assert all(g.is_contiguous(memory_format=f) for g, f in zip(got, formats, strict=False))
            named = dict(zip([name for name in NAMES if tensors[name] is not None], got, strict=True))
            assert largest_error(named, exact, bounds) <= 1, f"{path}: {format_case(case)}"


RELU = replace(BY_NAME["both_biases"], n=3, layout="nhwc", mid="silu", act="relu")


@pytest.fixture
def cudnn_relu(monkeypatch):
    """The operator, which a torch without CUDA does not have."""

    def fused(u, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(u, weight, bias, stride, padding, dilation, groups).relu_()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused, raising=False)


def candidates(case):
    tensors = operands(case.tensors())
    problem, shape, format = _ops.native_problem(*tensors, *geometry(case))
    forward = _cuda_paths.Forward.of(problem, shape, format, allows_tf32())
    return forward.paths(tensors, geometry(case))


def test_the_device_is_asked_for_the_hopper_kernel_where_that_decides_something(on_host, monkeypatch):
    asked = []
    monkeypatch.setattr(on_host, "has_hopper_kernel", lambda problem, device: asked.append(device) or True)
    assert HOPPER not in candidates(RELU)
    assert asked == []
    monkeypatch.setattr(_ops, "VERBOSE", True)
    assert list(candidates(RELU))[-1] == HOPPER
    assert HOPPER not in candidates(half(RELU))
    assert len(asked) == 1


def test_relu_and_bias_go_into_a_product_that_takes_them(on_host, cudnn_relu, monkeypatch):
    monkeypatch.setattr(_cuda_paths, "keeps_nan", lambda path, device, dtype: True)
    paths = candidates(RELU)
    assert list(paths) == [FUSED, DEPTHWISE, ADDMM, ADDMM_RELU, CUDNN_RELU, TORCH]
    tensors = RELU.tensors()
    exact, bound = oracle(RELU, tensors), error_bound(RELU, oracle(RELU, tensors, magnitude=True))
    for path, run_path in paths.items():
        got = run_path(operands(tensors))
        assert relative_error(got, exact, bound) <= 1, path
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert list(candidates(replace(RELU, act="relu6"))) == [FUSED, DEPTHWISE, ADDMM, TORCH]
    assert list(candidates(replace(RELU, b=0))) == [FUSED, DEPTHWISE, ADDMM, TORCH]
    assert list(candidates(replace(RELU, layout="nchw"))) == [FUSED, DEPTHWISE, TORCH]
    assert list(candidates(half(RELU))) == [DEPTHWISE, TORCH]


def test_products_that_torch_does_not_have_or_must_not_use_are_left_out(on_host, monkeypatch):
    monkeypatch.setattr(_cuda_paths, "keeps_nan", lambda path, device, dtype: True)
    monkeypatch.delattr(torch, "cudnn_convolution_relu", raising=False)
    assert list(candidates(RELU)) == [FUSED, DEPTHWISE, ADDMM, ADDMM_RELU, TORCH]
    monkeypatch.setattr(_cuda_paths, "products_allow_tf32", lambda: not allows_tf32())
    assert list(candidates(RELU)) == [FUSED, DEPTHWISE, TORCH]
    monkeypatch.setattr(_cuda_paths, "products_allow_tf32", allows_tf32)
    many = _cuda_paths.Forward.of(
        RELU.problem, (1 << 15, 7, 1 << 8, 1 << 8), torch.channels_last, allows_tf32()
    )
    assert list(many.paths(operands(RELU.tensors()), geometry(RELU))) == [FUSED, DEPTHWISE, TORCH]


@pytest.mark.parametrize("swallows", [False, True])
def test_a_product_that_swallows_nan_is_left_out(on_host, cudnn_relu, monkeypatch, swallows):
    """Which is tried once, and only where the device may be waited for."""
    tried = []

    def product(bias, rows, columns):
        tried.append(rows)
        y = torch.relu(torch.addmm(bias, rows, columns))
        return y.nan_to_num(0) if swallows else y

    monkeypatch.setattr(_cuda_paths, "_keeps_nan", {})
    monkeypatch.setattr(torch, "_addmm_activation", product)
    assert ADDMM_RELU not in candidates(RELU)
    assert not tried
    monkeypatch.setattr(_plan, "may_measure", lambda device: True)
    for _ in range(2):
        paths = candidates(RELU)
        assert (ADDMM_RELU in paths) is not swallows
        assert CUDNN_RELU in paths
    monkeypatch.setattr(_plan, "may_measure", lambda device: False)
    assert (ADDMM_RELU in candidates(RELU)) is not swallows
    assert len(tried) == 1


def test_a_second_call_asks_nothing_again(on_host, monkeypatch):
    """One lookup, and the launch; another kind of call is another matter."""
    tensors = operands(RELU.tensors())
    call_it = lambda given, *sizes: _cuda_kernels.forward_kernel(*given, None, *sizes)  # noqa: E731
    first = call_it(tensors, *geometry(RELU))
    needed = [True] * 5
    grad = torch.ones_like(first)
    gradients = _cuda_kernels.backward_kernel(grad, *tensors, first, *geometry(RELU), needed)
    for name in ("native_problem", "output_shape"):
        monkeypatch.setattr(_ops, name, lambda *_: pytest.fail("asked again"))
    for name in ("why_refused", "forward_workspace_bytes", "backward_workspace_bytes"):
        monkeypatch.setattr(on_host, name, lambda *_: pytest.fail("asked again"), raising=False)
    monkeypatch.setattr(_plan, "choose", lambda *_: pytest.fail("asked again"))
    *lists, mid, act = geometry(RELU)
    assert torch.equal(call_it(tensors, *map(list, lists), mid, act), first)  # as the dispatcher gives them
    again = _cuda_kernels.backward_kernel(grad, *tensors, first, *geometry(RELU), needed)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))
    x, dw, pw, db, b = tensors
    aside = torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()])[1:]
    aside = aside.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    for other, sizes in (
        ((x.double(), dw, pw, db, b), geometry(RELU)),
        ((x.contiguous(), dw, pw, db, b), geometry(RELU)),
        ((aside, dw, pw, db, b), geometry(RELU)),
        ((x[:1], dw, pw, db, b), geometry(RELU)),
        ((x, dw, pw[:3], db, b[:3]), geometry(RELU)),
        ((x, dw, pw, None, b), geometry(RELU)),
        ((x, dw, pw, db, None), geometry(RELU)),
        (tensors, (*geometry(RELU)[:4], "tanh")),
        (tensors, ((2, 2), *geometry(RELU)[1:])),
    ):
        with pytest.raises(pytest.fail.Exception, match="asked again"):
            call_it(other, *sizes)
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        _cuda_kernels.backward_kernel(grad, *tensors, None, *geometry(RELU), needed)
    with pytest.raises(pytest.fail.Exception, match="asked again"), _plan.force(TORCH):
        call_it(tensors, *geometry(RELU))


def test_a_lack_of_memory_names_the_shape(on_host, monkeypatch):
    """And is of torch's type, the first time and when all is known."""
    case = replace(BY_NAME["both_biases"], layout="nhwc")
    tensors = case.tensors()
    x, dw, pw = operands(tensors)[:3]
    forward(case, tensors)
    assert len(backward(case, tensors)) == 5

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(_cuda_paths, "workspace_of", no_memory)
    what = (
        rf"CUDA out of memory. Tried to allocate 2 GiB. In the {{}} pass for the float32 input "
        rf"{re.escape(str(list(x.shape)))}, {pw.shape[0]} output channels and a kernel of "
        rf"{dw.shape[2]} x {dw.shape[3]}\."
    )
    for _ in range(2):
        with _plan.force(FUSED):
            with pytest.raises(torch.OutOfMemoryError, match=what.format("forward")):
                forward(case, tensors)
            with pytest.raises(torch.OutOfMemoryError, match=what.format("backward")):
                backward(case, tensors)
        with pytest.raises(torch.OutOfMemoryError, match=what.format("forward")):
            forward(case, tensors)


@pytest.mark.parametrize("path", [FUSED, DEPTHWISE, TORCH])
@pytest.mark.parametrize("name", ["both_biases", "relu6", "gelu", "tanh", "stride_2_tf_same"])
def test_each_gradient_can_be_asked_for_alone(on_host, path, name):
    case = BY_NAME[name]
    tensors, grad = case.tensors(), case.gradient()
    exact, bounds = oracle_backward(case, tensors, grad), gradient_bounds(case, tensors, grad)
    for asked in NAMES:
        if tensors[asked] is not None:
            needed = [name == asked for name in NAMES]
            with _plan.force(path):
                got = backward(case, tensors, needed=needed)
            assert len(got) == 1
            assert largest_error({asked: got[0]}, exact, bounds) <= 1
    assert backward(case, tensors, needed=[False] * 5) == []


def test_no_images_are_no_call(on_host):
    case = BY_NAME["no_images"]
    tensors = case.tensors()
    assert forward(case, tensors).shape == case.output
    assert all(not g.any() for g in backward(case, tensors))
    assert on_host.calls == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_dtype_without_kernels_is_composed(on_host, dtype):
    case = BY_NAME["both_biases"]
    tensors = [None if t is None else t.to(dtype) for t in operands(case.tensors())]
    got = _cuda_kernels.forward_kernel(*tensors, None, *geometry(case))
    torch.testing.assert_close(got, _ops.composed_kernel(*tensors, None, *geometry(case)))
    if dtype.is_floating_point:
        needed = [t is not None for t in tensors]
        args = case.gradient().to(dtype), *tensors, None, *geometry(case), needed
        for value, expected in zip(
            _cuda_kernels.backward_kernel(*args), _backward.composed_kernel(*args), strict=True
        ):
            torch.testing.assert_close(value, expected)
    assert on_host.calls == []


def test_a_gpu_without_kernels_is_composed(on_host, monkeypatch):
    monkeypatch.setattr(_native, "why_not_on", lambda device: "too old")
    case = BY_NAME["both_biases"]
    tensors = case.tensors()
    torch.testing.assert_close(forward(case, tensors), call(case, tensors))
    assert on_host.calls == []


def test_what_the_kernels_refuse_is_composed(on_host):
    case = BY_NAME["many_images"]
    tensors = case.tensors()
    torch.testing.assert_close(forward(case, tensors), call(case, tensors))
    assert len(backward(case, tensors)) == sum(present(tensors))
    assert on_host.calls == []


def test_weights_of_another_device_are_refused(on_host):
    case = BY_NAME["both_biases"]
    x, dw, pw, db, b = operands(case.tensors())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bias must be on the input's device, cpu, got meta"):
            _cuda_kernels.forward_kernel(x, dw, pw, db, b.to("meta"), None, *geometry(case))
        _cuda_kernels.forward_kernel(x, dw, pw, db, b, None, *geometry(case))


def test_the_line_says_path_reason_and_time(on_host, lines, monkeypatch, capsys):
    case = BY_NAME["relu6"]
    tensors = case.tensors()
    y = forward(case, tensors)
    line = capsys.readouterr().err
    assert line.startswith("fastsep: cuda fused | by the model: fused ")
    assert "| 12.300 ms on the device, waited for |" in line
    assert parse_case(line) == replace(case, name="")
    backward(case, tensors, saved=y, needed=[True, False, True, False, False])
    line = capsys.readouterr().err
    assert line.startswith("fastsep: backward cuda ")
    assert ", gradients of input, pointwise_weight |" in line
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    forward(case, tensors)
    assert "| not timed in a graph |" in capsys.readouterr().err
    assert "hopper" not in line


def test_tf32_is_as_torch_says(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    assert _cuda_kernels.allows_tf32()
    monkeypatch.setattr(cudnn, "allow_tf32", False)
    assert not _cuda_kernels.allows_tf32()


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="an older torch has one word for it")
@pytest.mark.parametrize(("word", "allowed"), [("ieee", False), ("tf32", True)])
def test_tf32_by_its_newer_name(word, allowed):
    program = (
        f"import torch; torch.backends.cudnn.conv.fp32_precision = '{word}'; "
        "from fastsep import _cuda_kernels; print(_cuda_kernels.allows_tf32())"
    )
    assert run(f'python -c "{program}"').stdout.split() == [str(allowed)]


def test_the_operators_have_kernels_for_cuda():
    for name in ("separable_conv2d", "depthwise_conv2d"):
        for operator in (name, f"{name}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastsep::{operator}", "CUDA")


def test_a_call_on_a_gpu_may_pass_the_dispatcher_by():
    assert _ops.cuda_kernel is _cuda_kernels.forward_kernel
    assert _backward.cuda_kernel is _cuda_kernels.backward_kernel


def test_case_lines_name_their_dtype_to_the_kernels():
    numbers = [
        Case(1, 1, 1, 1, 1, 1, dtype=name).problem[16]
        for name in ("float32", "float64", "float16", "bfloat16")
    ]
    assert numbers == [0, 1, 2, 3]
