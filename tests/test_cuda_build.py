"""What can be known of the CUDA kernels where there is no GPU: the build, the module, and whether it serves.

How calls come to the kernels is in test_cuda_calls.py; the kernels' own arithmetic is tested on the host by
tests/cuda_host, and on a GPU by test_cuda.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import BY_NAME, CASES, half
from commands import ROOT, run

import fastsep
from fastsep import _native

built = importlib.util.find_spec("fastsep._cuda") is not None
needs_module = pytest.mark.skipif(not built, reason="the module _cuda was not built")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")

# Without a driver, a forward pass of this problem fails before anything is launched.
PROBLEM = replace(BY_NAME["plain_3x3"], dtype="float16").problem
NOTHING = (0,) * 6


@pytest.fixture
def cuda_module():
    if not built:
        pytest.skip("the module _cuda was not built")
    return importlib.import_module("fastsep._cuda")


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_error_of_cuda_names_the_shape(cuda_module):
    message = (
        r"CUDA error in the forward pass on device 0, .*: for the float16 input \[2, 8, 9, 10\], 16 output"
    )
    for kernel in (0, 0, 1):
        with pytest.raises(RuntimeError, match=message):
            cuda_module.forward(PROBLEM, False, kernel, *NOTHING, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="CUDA error in the backward pass"):
        cuda_module.backward(PROBLEM, False, *NOTHING, *(0,) * 5, 0, 0, 0, 0)


@pytest.mark.parametrize("kernel", [-1, 2])
def test_a_kernel_that_nobody_knows_is_a_value_error(cuda_module, kernel):
    with pytest.raises(ValueError, match=f"kernel must be 0 or 1, got {kernel}"):
        cuda_module.forward(PROBLEM, False, kernel, *NOTHING, 0, 0, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_kernel_for_one(cuda_module):
    assert not cuda_module.has_hopper_kernel(
        replace(BY_NAME["plain_3x3"], dtype="float16", layout="nhwc").problem, 0
    )


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
def test_a_bad_problem_is_a_value_error(cuda_module, change, message):
    problem = tuple(change.get(i, value) for i, value in enumerate(PROBLEM))
    for function in (cuda_module.forward_workspace_bytes, cuda_module.forward_kernel_name):
        with pytest.raises(ValueError, match=message):
            function(problem, False)
    with pytest.raises(ValueError, match=message):
        cuda_module.forward(problem, False, 0, *NOTHING, 0, 0, 0, 0)


def test_a_gpu_has_no_fewer_multiprocessors_than_none(cuda_module):
    cuda_module.pretend_multiprocessors(0)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        cuda_module.pretend_multiprocessors(-1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_a_kernel_and_a_workspace(cuda_module, case):
    for dtype in ("float32", "float16", "bfloat16"):
        for layout in ("nchw", "nhwc"):
            for part in (case, half(case)):
                problem = replace(part, dtype=dtype, layout=layout).problem
                for tf32 in (False, True):
                    assert cuda_module.forward_kernel_name(problem, tf32)
                    assert cuda_module.forward_workspace_bytes(problem, tf32) >= 0
                    asked = (1, 1, 1, 1, 1) if part.k else (1, 1, 1, 0, 0)
                    assert cuda_module.backward_workspace_bytes(problem, tf32, *asked) >= 0


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
