"""On a GPU: what the planner measures, which calls are refused, and what an error leaves behind.

pytest -m cuda
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BY_NAME, WRONG, good_call
from commands import run
from gpu_cases import GPU, LAYER, exactly, image, layer, on_gpu

import fastsep
from fastsep import _native, _plan
from fastsep._case import parse_case
from fastsep._check import call, error_bound, relative_error
from fastsep._cuda_model import ADDMM, DEPTHWISE, FUSED, TORCH

pytestmark = GPU


# ---- the planner


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_with_cudnn_benchmark_the_paths_are_measured_once(phase, monkeypatch):
    torch.backends.cudnn.benchmark = True
    measured = []
    measure = _plan.measure
    monkeypatch.setattr(_plan, "measure", lambda found: measured.append(list(found)) or measure(found))
    _plan.forget()
    module, x = layer(LAYER, torch.bfloat16), image(dtype=torch.bfloat16).requires_grad_(phase == "backward")
    for _ in range(3):
        y = module(x)
        if phase == "backward":
            torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert (
        measured == [[FUSED, DEPTHWISE, ADDMM, TORCH], [FUSED, DEPTHWISE, TORCH]][: 1 + (phase != "forward")]
    )
    assert all(choice.measured for choice in _plan._choices.values())


def test_the_model_knows_this_gpu():
    gpu = _plan.Gpu.of(0)
    assert gpu.name == torch.cuda.get_device_name(0)
    assert 1e11 < gpu.bandwidth < 2e13
    assert 1e12 < gpu.fma < gpu.matrix < 1e16


# ---- bad input and errors


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_wrong_call_is_refused_as_on_the_cpu(wrong):
    arguments = good_call() | wrong.change
    if wrong.name == "size_overflow":
        pytest.skip("more than a GPU holds")
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            arguments[name] = value.cuda()
    with pytest.raises(wrong.error, match=wrong.message):
        fastsep.separable_conv2d(**arguments)
    usable()


def usable():
    """Whether torch and the kernels still work, and no error is left for the next who asks."""
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum().item() == 3
    case = BY_NAME["both_biases"]
    tensors = case.tensors()
    exact, magnitude = exactly(case, tensors)
    with _plan.force(FUSED):
        assert relative_error(call(case, on_gpu(tensors)).cpu(), exact, error_bound(case, magnitude)) <= 1


def test_an_error_of_cuda_names_the_shape_and_leaves_the_device_usable():
    problem = replace(BY_NAME["plain_3x3"], dtype="float16").problem
    message = r"CUDA error in the forward pass on device 9999, .*input \[2, 8, 9, 10\]"
    with pytest.raises(RuntimeError, match=message):
        _native.cuda.forward(problem, False, 0, *(0,) * 6, 0, 0, 9999, 0)
    usable()


def test_a_lack_of_memory_leaves_the_device_usable():
    x = torch.empty(1, 1, 1, 1, device="cuda", dtype=torch.float16).expand(1 << 12, 64, 1 << 10, 1 << 10)
    shape = r"In the forward pass for the float16 input \[4096, 64, 1024, 1024\], 64 output channels"
    with pytest.raises(torch.OutOfMemoryError, match=shape):
        fastsep.separable_conv2d(
            x,
            torch.randn(64, 1, 3, 3, device="cuda").half(),
            torch.randn(64, 64, 1, 1, device="cuda").half(),
            padding=1,
        )
    usable()


def test_too_small_a_workspace_is_refused():
    case = replace(BY_NAME["both_biases"], dtype="bfloat16")
    asked = (1, 1, 1, 1, 1)
    if _native.cuda.backward_workspace_bytes(case.problem, False, *asked) > 0:
        with pytest.raises(ValueError, match="workspace"):
            _native.cuda.backward(case.problem, False, *(0,) * 6, *asked, 0, 0, 0, 0)
    usable()


def test_verbose_says_path_reason_and_time():
    program = (
        "import torch, fastsep; layer = fastsep.SeparableConv2d(8, 16, 3, padding=1).cuda().half(); "
        "layer(torch.randn(2, 8, 9, 9, device='cuda').half()).sum().backward()"
    )
    result = run(f'python -c "{program}"', FASTSEP_VERBOSE="1")
    assert result.returncode == 0, result.stderr
    first, second = [line for line in result.stderr.splitlines() if line.startswith("fastsep: ")]
    assert first.startswith("fastsep: cuda ")
    assert "by the model: fused " in first
    assert second.startswith("fastsep: backward cuda ")
    assert "ms on the device, waited for" in first
    assert parse_case(first) == parse_case(second)


def test_info_tells_of_the_gpu():
    pytest.importorskip("rich")
    result = run("python -m fastsep info")
    assert result.returncode == 0, result.stderr
    assert torch.cuda.get_device_name(0) in result.stdout
