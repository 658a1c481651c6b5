"""The forward kernel for compute capability 9.0 as a path: taken where it was measured or is named, and
nowhere else, since an error of it may hang. Nothing here needs a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from commands import run

from fastsep import _cuda_model, _plan
from fastsep._cuda_model import BACKWARD, DEPTHWISE, FORWARD, FUSED, HOPPER, TORCH, Asked, Gpu
from fastsep.bench.layers import load

GPU = Gpu("test", multiprocessors=100, bandwidth=4e12, fma=6e13, matrix=8e14)
MIDDLE = replace(load("mobilenet_v1").layers[7], n=128, dtype="bfloat16", layout="nhwc")
KEY = _plan.factor_key(MIDDLE.problem, FORWARD, HOPPER, False)
EVERY = dict.fromkeys((FUSED, DEPTHWISE, TORCH, HOPPER), lambda: None)


@pytest.fixture(autouse=True)
def _unplanned(monkeypatch):
    monkeypatch.setattr(_plan, "_choices", {})
    monkeypatch.setattr(_plan, "calls", {})
    monkeypatch.setattr(_plan, "NAMED", "")
    monkeypatch.setattr(_plan, "factors", dict)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def choose(*, problem=MIDDLE.problem, phase=FORWARD, gpu=GPU, asked=Asked(), seconds_of=None):  # noqa: B008
    return _plan.choose(
        *(problem, phase, False, asked, 0, EVERY), gpu_of=lambda index: gpu, seconds_of=seconds_of
    )


def test_that_it_was_not_measured_is_said():
    choice = choose()
    assert choice.path != HOPPER
    assert choice.why.endswith("; hopper left out, it was not measured on a test")
    assert "hopper " not in choice.why.split("; ")[0]
    assert choose() == choice


@pytest.mark.parametrize(
    "factors",
    [
        {"test": {"forward fused bfloat16 nhwc": 1.0}},
        {"test": {KEY.replace("bfloat16", "float16"): 1e-3}},
        {"test": {KEY.replace("forward", "backward"): 1e-3}},
        {"another": {KEY: 1e-3}},
    ],
)
def test_what_was_measured_of_others_does_not_count(monkeypatch, factors):
    monkeypatch.setattr(_plan, "factors", lambda: factors)
    assert "it was not measured on a test" in choose().why


def test_it_is_taken_where_it_was_measured_and_is_the_fastest(monkeypatch):
    monkeypatch.setattr(_plan, "factors", lambda: {"test": {KEY: 0.1}})
    choice = choose()
    assert choice.path == HOPPER
    assert choice.why.startswith("by the model: fused ")
    assert "left out" not in choice.why
    monkeypatch.setattr(_plan, "factors", lambda: {"test": {KEY: 100.0}})
    _plan.forget()
    choice = choose()
    assert choice.path != HOPPER
    assert "hopper " in choice.why
    assert "left out" not in choice.why


def test_addresses_that_it_does_not_take(monkeypatch):
    monkeypatch.setattr(_plan, "factors", lambda: {"test": {KEY: 0.1}})
    unaligned = "; hopper left out, it wants addresses that are multiples of 16"
    choice = choose(asked=Asked(aligned=False))
    assert choice.path != HOPPER
    assert choice.why.endswith(unaligned)
    with _plan.force(HOPPER):
        assert choose(asked=Asked(aligned=False)) == choice
    monkeypatch.setattr(_plan, "NAMED", HOPPER)
    assert choose(asked=Asked(aligned=False)) == choice
    assert choose().path == HOPPER


def test_it_is_not_even_timed_where_it_was_not_measured(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class OfDevice:
        def __init__(self, index): ...
        def __enter__(self): ...
        def __exit__(self, *_): ...

    monkeypatch.setattr(torch.cuda, "device", OfDevice)
    timed = []

    def seconds_of(candidates):
        timed.append(set(candidates))
        return {path: 1e-6 if path == HOPPER else 1e-3 for path in candidates}

    assert choose(seconds_of=seconds_of).why.endswith("; hopper left out, it was not measured on a test")
    monkeypatch.setattr(_plan, "factors", lambda: {"test": {KEY: 1.0}})
    _plan.forget()
    assert choose(seconds_of=seconds_of).path == HOPPER
    assert timed == [set(EVERY) - {HOPPER}, set(EVERY)]


def test_it_is_taken_where_it_is_named(monkeypatch):
    with _plan.force(HOPPER):
        assert choose() == (HOPPER, "forced", True)
    monkeypatch.setattr(_plan, "NAMED", HOPPER)
    assert choose() == (HOPPER, "named by FASTSEP_CUDA_KERNEL", True)
    with _plan.force(FUSED):
        assert choose().path == FUSED


def test_the_environment_names_any_path(monkeypatch):
    monkeypatch.setattr(_plan, "NAMED", DEPTHWISE)
    assert choose() == (DEPTHWISE, "named by FASTSEP_CUDA_KERNEL", True)
    monkeypatch.setattr(_plan, "NAMED", _cuda_model.ADDMM)
    choice = choose()  # a call without it
    assert choice.why.startswith("by the model")
    assert choice.why.endswith(
        "; addmm, named by FASTSEP_CUDA_KERNEL, is not there for such a call on this GPU"
    )
    with _plan.force(_cuda_model.CUDNN_RELU):
        assert choose().why.endswith("; cudnn_relu, forced, is not there for such a call on this GPU")
    monkeypatch.setattr(_plan, "NAMED", "")
    assert "is not there" not in choose().why


def test_a_path_that_there_is_not_is_refused():
    """Not at import, but at the first call that has to choose, and at each that follows."""
    program = (
        "import torch, fastsep\n"
        "from fastsep import _plan\n"
        "print(_plan.forced(), *fastsep.SeparableConv2d(4, 4, 3)(torch.randn(1, 4, 5, 5)).shape)\n"
        "for _ in range(2):\n"
        "    try: _plan.choose((), 'forward', False, _plan.ALL, 0, {})\n"
        "    except ValueError as error: print(error)\n"
    )
    result = run(f'python -c "{program}"', FASTSEP_CUDA_KERNEL="ampere")
    assert result.returncode == 0, result.stderr
    first, *errors = result.stdout.splitlines()
    assert first == "ampere 1 4 3 3"
    paths = "fused, hopper, depthwise, addmm, addmm_relu, cudnn_relu or torch"
    assert errors == [f"FASTSEP_CUDA_KERNEL is 'ampere', expected {paths}"] * 2
    result = run('python -c "from fastsep import _plan; print(_plan.forced())"', FASTSEP_CUDA_KERNEL="hopper")
    assert (result.returncode, result.stdout) == (0, "hopper\n")


def test_the_shipped_factors_hold_what_was_measured(monkeypatch):
    """Whether any GPU has one decides whether a GPU is asked for the kernel at all."""
    assert not _plan.was_measured(HOPPER)
    monkeypatch.setattr(
        _plan, "factors", lambda: {"test": {"forward fused bfloat16 nhwc": 1.0}, "b": {KEY: 1.0}}
    )
    assert _plan.was_measured(HOPPER)


def test_the_model_has_it_for_large_products():
    """There it makes the depthwise half half as often; small ones leave most of its large tiles' GPU idle."""
    fused, own = (_cuda_model.steps(MIDDLE.problem, FORWARD, path) for path in (FUSED, HOPPER))
    assert (MIDDLE.c, MIDDLE.k) == (512, 512)
    assert own[0].fma == fused[0].fma / 2
    assert (own[0].bytes, own[0].matrix) == (fused[0].bytes, fused[0].matrix)
    few, many = (
        [_cuda_model.modelled(problem, FORWARD, path, GPU, False) for path in (FUSED, HOPPER)]
        for problem in (replace(MIDDLE, n=1).problem, MIDDLE.problem)
    )
    assert few[0] < few[1]
    assert many[0] > many[1]
    assert _cuda_model.modelled(MIDDLE.problem, BACKWARD, HOPPER, GPU, False) > 0
