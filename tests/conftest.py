"""Fixtures, and what a failing case prints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_stand_in import OnHost
from optimizing import Block, made

import fastsep
from fastsep import _backward, _cuda_model, _cuda_paths, _native, _ops, _plan

ISAS = _native.core.isas() if _native.core is not None else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that runs here."""
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch its number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def native_calls(monkeypatch):
    """The arguments of every native call that did not take the way through the dispatcher."""
    calls = []
    kernel = _ops.cpu_kernel
    monkeypatch.setattr(_ops, "cpu_kernel", lambda *args: calls.append(args) or kernel(*args))
    return calls


@pytest.fixture
def native_backward_calls(monkeypatch):
    """The same of the gradients."""
    calls = []
    kernel = _backward.cpu_kernel
    monkeypatch.setattr(_backward, "cpu_kernel", lambda *args: calls.append(args) or kernel(*args))
    return calls


@pytest.fixture
def native_steps(monkeypatch):
    """The names of the packed steps that ran."""
    from fastsep._optimize import series, steps  # which want rich, and not every machine with a GPU has it

    calls = []

    def watch(kind, names):
        call = kind.__call__

        def watched(self, *inputs):
            calls.extend(names(self))
            return call(self, *inputs)

        monkeypatch.setattr(kind, "__call__", watched)

    watch(steps.PackedStep, lambda step: [step.__name__])
    watch(series.SeriesStep, lambda step: [link.__name__ for link in step.links])
    return calls


@pytest.fixture
def pair():
    """A model and its optimized copy."""
    model = made(Block())
    return model, fastsep.optimize(model)


@pytest.fixture
def on_host(monkeypatch):
    """Has the operators' kernels for CUDA run on the CPU."""
    module = OnHost()
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(_native, "why_not_on", lambda device: "")
    monkeypatch.setattr(_cuda_paths, "stream_of", lambda device: 17)
    monkeypatch.setattr(_cuda_model.Gpu, "of", lambda device: _cuda_model.Gpu("test", 100, 4e12, 6e13, 8e14))
    monkeypatch.setattr(_plan, "_choices", {})
    monkeypatch.setattr(_plan, "calls", {})
    monkeypatch.setattr(_cuda_paths, "products_allow_tf32", _cuda_paths.allows_tf32)
    return module


@pytest.fixture
def lines(monkeypatch):
    """Has each call on a GPU print its line, also without one: the time is made up."""
    monkeypatch.setattr(_ops, "VERBOSE", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    monkeypatch.setattr(_plan.Stopwatch, "__call__", lambda self, run, calls: (run(), 0.0123)[1])


@pytest.fixture
def exact_gpu():
    """On a GPU, float32 as it is, and the model alone to choose a path."""
    assert _native.cuda is not None, _native.cuda_missing
    assert not _native.why_not_on(torch.cuda.current_device())
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn.allow_tf32, cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = False, False, False
    yield
    cudnn.allow_tf32, cudnn.benchmark = before
    torch.backends.cuda.matmul.allow_tf32 = matmul
    _plan.forget()
