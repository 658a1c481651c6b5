"""What can be known of the CUDA kernels where there is no GPU: the build, the module, and the way to it.

The kernels' own arithmetic is tested on the host by tests/cuda_host, and on a GPU by test_cuda.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, half
from commands import ROOT, run

import fastsep
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
from fastsep._cuda_model import ADDMM, ADDMM_RELU, CUDNN_RELU, DEPTHWISE, FUSED, HOPPER, TORCH, Gpu

allows_tf32 = _cuda_paths.allows_tf32
built = importlib.util.find_spec("fastsep._cuda") is not None
needs_module = pytest.mark.skipif(not built, reason="the module _cuda was not built")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")

# Without a driver, a forward pass of this problem fails before anything is launched.
PROBLEM = replace(BY_NAME["plain_3x3"], dtype="float16").problem
NOTHING = (0,) * 6


# ---- the build


def configure(folder, *options, **environment):
    """The lines that configuring the checkout prints of CUDA, and its exit status."""
    cmake = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        folder,
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
    ]
    result = subprocess.run(cmake, env={**os.environ, **environment}, capture_output=True, text=True)
    lines = (result.stdout + result.stderr).splitlines()
    return result.returncode, [line for line in lines if "CUDA" in line]


@needs_cmake
def test_a_cuda_compiler_that_does_not_work_is_one_line(tmp_path):
    status, lines = configure(tmp_path, "-DCMAKE_CUDA_COMPILER=/bin/false")
    assert status == 0
    assert len(lines) == 1
    assert lines[0].startswith(
        "-- fastsep: CUDA kernels left out, /bin/false does not work for the architectures"
    )
    (log,) = tmp_path.rglob("check/log.txt")
    assert str(log) in lines[0]
    assert log.stat().st_size > 0


@needs_cmake
def test_no_cuda_compiler_is_one_line(tmp_path):
    found = configure(tmp_path, "-DFASTSEP_NVCC=", CUDACXX="")
    assert found == (0, ["-- fastsep: CUDA kernels left out, no CUDA compiler was found"])


@needs_cmake
def test_a_demand_that_cannot_be_met_is_an_error(tmp_path):
    status, lines = configure(tmp_path, "-DFASTSEP_CUDA=ON", "-DCMAKE_CUDA_COMPILER=/bin/false")
    assert status != 0
    assert any("FASTSEP_CUDA is ON, but /bin/false does not work" in line for line in lines)


@needs_cmake
def test_off_asks_for_no_compiler(tmp_path):
    assert configure(tmp_path, "-DFASTSEP_CUDA=OFF", CUDACXX="/bin/false") == (0, [])


@needs_cmake
def test_another_word_is_an_error(tmp_path):
    status, lines = configure(tmp_path, "-DFASTSEP_CUDA=maybe")
    assert status != 0
    assert "  FASTSEP_CUDA must be AUTO, ON or OFF, got MAYBE" in lines


@needs_cmake
def test_without_pybind11_its_headers_are_those_of_torch(tmp_path):
    """Which is what a machine with a GPU and no network may have; compiled, for a module of one line."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        'PYBIND11_MODULE(one, m, pybind11::mod_gil_not_used()) { m.def("one", [] { return 1; }); }\n'
    )
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(one LANGUAGES CXX)\nset(CMAKE_CXX_STANDARD 17)\n"
        "find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)\n"
        f"include({ROOT}/cmake/BundledPybind11.cmake)\npybind11_add_module(one MODULE NO_EXTRAS one.cpp)\n"
    )
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", build],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    program = "import one, torch; print(one.one())"  # beside torch, which has a pybind11 of its own at work
    result = run(f'python -c "{program}"', PYTHONPATH=str(build))
    assert result.stdout.split() == ["1"], result.stderr


@needs_cmake
def test_the_project_falls_back_to_them(tmp_path):
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-DFASTSEP_CUDA=OFF", "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"-- fastsep: pybind11 [\d.]+ of torch, .*/torch/include\n", result.stdout)


# ---- the module


@needs_module
def test_the_module_loads_without_a_driver():
    """In a process of its own, with every GPU hidden."""
    program = "from fastsep import _cuda; print(_cuda.device_count(), _cuda.architectures())"
    result = run(f'python -c "{program}"', CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    count, *architectures = result.stdout.split()
    assert count == "0"
    assert architectures


@needs_module
def test_the_module_needs_no_cuda_library_and_shows_no_symbol_of_cuda():
    path = importlib.util.find_spec("fastsep._cuda").origin
    needed = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    assert "libcud" not in needed
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", path], check=True, capture_output=True, text=True
    ).stdout
    names = [line.split()[-1] for line in shown.splitlines()]
    assert "PyInit__cuda" in names
    assert not [name for name in names if name.startswith("cu") or "fastsep" in name]


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_error_of_cuda_names_the_shape():
    from fastsep import _cuda

    message = (
        r"CUDA error in the forward pass on device 0, .*: for the float16 input \[2, 8, 9, 10\], 16 output"
    )
    for forward in (_cuda.forward, _cuda.forward, _cuda.forward_hopper):
        with pytest.raises(RuntimeError, match=message):
            forward(PROBLEM, False, *NOTHING, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="CUDA error in the backward pass"):
        _cuda.backward(PROBLEM, False, *NOTHING, *(0,) * 5, 0, 0, 0, 0)


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_kernel_for_one():
    from fastsep import _cuda

    assert not _cuda.has_hopper_kernel(
        replace(BY_NAME["plain_3x3"], dtype="float16", layout="nhwc").problem, 0
    )


@needs_module
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({16: 1}, "dtype"),  # float64
        ({16: 9}, "dtype"),
        ({18: 99}, "activation"),
        ({1: 0}, "at least 1"),
        ({0: -1}, "at least 0"),
        ({2: 1}, "larger than the padded input"),
        ({0: 2**40, 2: 2**20, 3: 2**20}, "64 bits"),
    ],
)
def test_a_bad_problem_is_a_value_error(change, message):
    from fastsep import _cuda

    problem = tuple(change.get(i, value) for i, value in enumerate(PROBLEM))
    for function in (_cuda.forward_workspace_bytes, _cuda.forward_kernel_name):
        with pytest.raises(ValueError, match=message):
            function(problem, False)
    with pytest.raises(ValueError, match=message):
        _cuda.forward(problem, False, *NOTHING, 0, 0, 0, 0)


@needs_module
def test_a_gpu_has_no_fewer_multiprocessors_than_none():
    from fastsep import _cuda

    _cuda.pretend_multiprocessors(0)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        _cuda.pretend_multiprocessors(-1)


@needs_module
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_a_kernel_and_a_workspace(case):
    from fastsep import _cuda

    for dtype in ("float32", "float16", "bfloat16"):
        for layout in ("nchw", "nhwc"):
            for part in (case, half(case)):
                problem = replace(part, dtype=dtype, layout=layout).problem
                for tf32 in (False, True):
                    assert _cuda.forward_kernel_name(problem, tf32)
                    assert _cuda.forward_workspace_bytes(problem, tf32) >= 0
                    asked = (1, 1, 1, 1, 1) if part.k else (1, 1, 1, 0, 0)
                    assert _cuda.backward_workspace_bytes(problem, tf32, *asked) >= 0


# ---- the way to it


def test_importing_never_fails_for_lack_of_the_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastsep._cuda", None)  # an ImportError
    monkeypatch.delattr(fastsep, "_cuda", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    module, reason = _native._load_cuda()
    assert module is None
    assert "_cuda" in reason
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _native._load_cuda() == (None, "this torch was built without CUDA")


def fake(architectures="80 90a-real", count=1):
    return SimpleNamespace(
        architectures=lambda: architectures, device_count=lambda: count, runtime_version=lambda: 13020
    )


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80 90a-real", (8, 0), True),
        ("80 90a-real", (8, 9), True),
        ("80 90a-real", (9, 0), True),
        ("80 90a-real", (12, 1), True),  # by PTX
        ("80 90a-real", (7, 5), False),
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("90-virtual", (8, 9), False),
        ("90-virtual", (10, 3), True),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f-real", (10, 0), True),
        ("native", (7, 0), True),
    ],
)
def test_kernels_run_on_gpus_they_were_compiled_for(monkeypatch, architectures, capability, runs):
    monkeypatch.setattr(_native, "cuda", fake(architectures))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    major, minor = capability
    expected = f"the CUDA kernels were compiled for {architectures}, the GPU is of {major}.{minor}"
    assert _native._why_not_on(0) == ("" if runs else expected)


def test_a_driver_that_is_too_old_is_a_reason(monkeypatch):
    monkeypatch.setattr(_native, "cuda", fake(count=0))
    assert _native._why_not_on(0) == "the CUDA kernels want a driver for CUDA 13.2"


class OnHost:
    """The module _cuda, as far as the kernels for the CPU can stand in for it: float32, no GPU, no stream."""

    def __init__(self):
        self.calls = []

    derivative_from_output = staticmethod(lambda code: _native.core.derivative_from_output(code))

    def why_refused(self, problem):
        return "too large" if problem[0] == 33 else ""

    def forward_workspace_bytes(self, problem, tf32):
        return 192

    def forward(self, problem, tf32, x, dw, db, pw, b, output, workspace, size, device, stream):
        assert size == 192
        assert workspace
        assert stream == 17
        self.calls.append("forward" if problem[4] else "depthwise forward")
        _native.core.forward(problem, "", x, dw, db, pw, b, output)

    def has_hopper_kernel(self, problem, device):
        return problem[1] % 8 == 0

    def forward_hopper(self, *arguments):
        self.forward(*arguments)
        self.calls[-1] = "forward hopper"

    def backward_workspace_bytes(self, problem, tf32, *asked):
        assert any(asked)
        return 0

    def backward(self, problem, tf32, x, dw, db, pw, saved, grad, *rest):
        *asked, workspace, size, _device, stream = rest
        assert (workspace, size, stream) == (0, 0, 17)
        self.calls.append("backward" if problem[4] else "depthwise backward")
        _native.core.backward(problem, "", x, dw, db, pw, saved, grad, *asked)


@pytest.fixture
def on_host(monkeypatch):
    """Has the operators' kernels for CUDA run on the CPU."""
    module = OnHost()
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(_native, "why_not_on", lambda device: "")
    monkeypatch.setattr(_cuda_paths, "stream_of", lambda device: 17)
    monkeypatch.setattr(Gpu, "of", lambda device: Gpu("test", 100, 4e12, 6e13, 8e14))
    monkeypatch.setattr(_plan, "_choices", {})
    monkeypatch.setattr(_plan, "calls", {})
    monkeypatch.setattr(_cuda_paths, "products_allow_tf32", allows_tf32)
    return module


def case_format(case):
    return _ops.memory_format(case.tensors()["input"])


def geometry(case):
    return (case.sh, case.sw), (case.pt, case.pb, case.pl, case.pr), (case.dh, case.dw), case.mid, case.act


PATHS = pytest.mark.parametrize("path", [FUSED, DEPTHWISE, TORCH])
PARTS = pytest.mark.parametrize("part", [lambda case: case, half], ids=["separable", "depthwise"])
LAYOUTS = pytest.mark.parametrize("layout", ["nchw", "nhwc"])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
@PARTS
@LAYOUTS
def test_every_path_forward(on_host, case, part, layout):
    case = replace(part(case), layout=layout)
    tensors = case.tensors()
    exact, bound = oracle(case, tensors), error_bound(case, oracle(case, tensors, magnitude=True))
    for path in (FUSED, DEPTHWISE, ADDMM, TORCH):
        with _plan.force(path):
            got = _cuda_kernels.forward_kernel(*operands(tensors), None, *geometry(case))
        assert relative_error(got, exact, bound) <= 1, f"{path}: {format_case(case)}"
        assert got.is_contiguous(memory_format=case_format(case))
    expected = ["forward", "depthwise forward"] if case.k else ["depthwise forward"]
    assert on_host.calls[: len(expected)] == (expected if case.n not in (0, 33) else [])


@pytest.mark.parametrize(("channels", "calls"), [(16, ["forward hopper"]), (12, [])])
@pytest.mark.parametrize("how", ["forced", "named", "measured"])
def test_the_hopper_kernel_runs_where_it_is_asked_for_or_was_measured(
    on_host, monkeypatch, channels, calls, how
):
    """And where there is one. Nothing was measured of it yet, so the model does not take it by itself."""
    case = replace(BY_NAME["padded_3x3"], c=channels, layout="nhwc")
    tensors = case.tensors()

    def check():
        got = _cuda_kernels.forward_kernel(*operands(tensors), None, *geometry(case))
        torch.testing.assert_close(got, oracle(case, tensors).float(), rtol=1e-4, atol=1e-4)
        return [name for name in on_host.calls if "hopper" in name]

    assert check() == []
    if how == "named":
        monkeypatch.setattr(_plan, "NAMED", HOPPER)
    if how == "measured":
        key = _plan.factor_key(case.problem, "forward", HOPPER, False)
        monkeypatch.setattr(_plan, "factors", lambda: {"test": {key: 0.01}})
        _plan.forget()
    with _plan.force(HOPPER) if how == "forced" else nullcontext():
        assert check() == calls


def test_the_device_is_asked_for_the_hopper_kernel_where_that_decides_something(on_host, monkeypatch):
    asked = []
    monkeypatch.setattr(on_host, "has_hopper_kernel", lambda problem, device: asked.append(device) or True)
    assert HOPPER not in candidates(RELU)
    assert asked == []
    monkeypatch.setattr(_ops, "VERBOSE", True)
    assert list(candidates(RELU))[-1] == HOPPER
    assert HOPPER not in candidates(half(RELU))
    assert len(asked) == 1


@every_case
@PARTS
def test_every_path_backward(on_host, case, part):
    case = replace(part(case), layout="nhwc" if case.c % 2 else "nchw")
    tensors, grad = case.tensors(), case.gradient()
    exact, bounds = oracle_backward(case, tensors, grad), gradient_bounds(case, tensors, grad)
    needed = [tensor is not None for tensor in operands(tensors)]
    y = _ops.run(*operands(tensors), None, *geometry(case))
    keeps = _native.core.derivative_from_output(_ops.ACTIVATIONS[case.act].code) and case.act != "identity"
    for path in (FUSED, DEPTHWISE, TORCH):
        for saved in [None, y] if keeps else [None]:
            with _plan.force(path):
                args = grad, *operands(tensors), saved, *geometry(case), needed
                got = _cuda_kernels.backward_kernel(*args)
            formats = [case_format(case)] + [torch.contiguous_format] * 4
            assert all(g.is_contiguous(memory_format=f) for g, f in zip(got, formats, strict=False))
            named = dict(zip([n for n, need in zip(NAMES, needed, strict=True) if need], got, strict=True))
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
    tensors, grad = operands(case.tensors()), case.gradient()
    x, dw, pw = tensors[:3]
    needed = [True] * 5
    _cuda_kernels.forward_kernel(*tensors, None, *geometry(case))
    y = _cuda_kernels.backward_kernel(grad, *tensors, None, *geometry(case), needed)
    assert len(y) == 5

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
                _cuda_kernels.forward_kernel(*tensors, None, *geometry(case))
            with pytest.raises(torch.OutOfMemoryError, match=what.format("backward")):
                _cuda_kernels.backward_kernel(grad, *tensors, None, *geometry(case), needed)
        with pytest.raises(torch.OutOfMemoryError, match=what.format("forward")):
            _cuda_kernels.forward_kernel(*tensors, None, *geometry(case))


@PATHS
@pytest.mark.parametrize("name", ["both_biases", "relu6", "gelu", "tanh", "stride_2_tf_same"])
def test_each_gradient_can_be_asked_for_alone(on_host, path, name):
    case = BY_NAME[name]
    tensors, grad = case.tensors(), case.gradient()
    exact, bounds = oracle_backward(case, tensors, grad), gradient_bounds(case, tensors, grad)
    for asked in NAMES:
        if tensors[asked] is not None:
            needed = [name == asked for name in NAMES]
            with _plan.force(path):
                got = _cuda_kernels.backward_kernel(grad, *operands(tensors), None, *geometry(case), needed)
            assert len(got) == 1
            assert largest_error({asked: got[0]}, exact, bounds) <= 1
    assert _cuda_kernels.backward_kernel(grad, *operands(tensors), None, *geometry(case), [False] * 5) == []


def test_no_images_are_no_call(on_host):
    case = BY_NAME["no_images"]
    tensors = case.tensors()
    needed = [tensor is not None for tensor in operands(tensors)]
    assert _cuda_kernels.forward_kernel(*operands(tensors), None, *geometry(case)).shape == case.output
    args = case.gradient(), *operands(tensors), None, *geometry(case), needed
    assert all(not g.any() for g in _cuda_kernels.backward_kernel(*args))
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
    got = _cuda_kernels.forward_kernel(*operands(tensors), None, *geometry(case))
    torch.testing.assert_close(got, call(case, tensors))
    assert on_host.calls == []


def test_what_the_kernels_refuse_is_composed(on_host):
    case = BY_NAME["many_images"]
    tensors, grad = case.tensors(), case.gradient()
    got = _cuda_kernels.forward_kernel(*operands(tensors), None, *geometry(case))
    torch.testing.assert_close(got, call(case, tensors))
    needed = [tensor is not None for tensor in operands(tensors)]
    gradients = _cuda_kernels.backward_kernel(grad, *operands(tensors), None, *geometry(case), needed)
    assert len(gradients) == sum(needed)
    assert on_host.calls == []


def test_weights_of_another_device_are_refused(on_host):
    case = BY_NAME["both_biases"]
    x, dw, pw, db, b = operands(case.tensors())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bias must be on the input's device, cpu, got meta"):
            _cuda_kernels.forward_kernel(x, dw, pw, db, b.to("meta"), None, *geometry(case))
        _cuda_kernels.forward_kernel(x, dw, pw, db, b, None, *geometry(case))


def test_the_line_says_path_reason_and_time(on_host, monkeypatch, capsys):
    monkeypatch.setattr(_ops, "VERBOSE", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    monkeypatch.setattr(_plan.Stopwatch, "__call__", lambda self, run, calls: (run(), 0.0123)[1])
    case = BY_NAME["relu6"]
    tensors = case.tensors()
    y = _cuda_kernels.forward_kernel(*operands(tensors), None, *geometry(case))
    line = capsys.readouterr().err
    assert line.startswith("fastsep: cuda fused | by the model: fused ")
    assert "| 12.300 ms on the device, waited for |" in line
    assert parse_case(line) == replace(case, name="")
    needed = [True, False, True, False, False]
    _cuda_kernels.backward_kernel(case.gradient(), *operands(tensors), y, *geometry(case), needed)
    line = capsys.readouterr().err
    assert line.startswith("fastsep: backward cuda ")
    assert ", gradients of input, pointwise_weight |" in line
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _cuda_kernels.forward_kernel(*operands(tensors), None, *geometry(case))
    assert "| not timed in a graph |" in capsys.readouterr().err
    assert "hopper" not in line
    case = replace(case, c=16, layout="nhwc")
    _cuda_kernels.forward_kernel(*operands(case.tensors()), None, *geometry(case))
    assert "; hopper left out, it was not measured on a test |" in capsys.readouterr().err
    monkeypatch.setattr(_plan, "NAMED", HOPPER)
    _cuda_kernels.forward_kernel(*operands(case.tensors()), None, *geometry(case))
    line = capsys.readouterr().err
    assert line.startswith("fastsep: cuda hopper | named by FASTSEP_CUDA_KERNEL |")
    assert parse_case(line) == replace(case, name="")


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
