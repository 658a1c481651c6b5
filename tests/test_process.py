"""What the process is to the layer: threads, forked children, imports."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import BY_NAME
from commands import run
from timing import best_in_turns

import fastsep
from fastsep import SeparableConv2d, _native

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")
CASE = BY_NAME["channels_64_to_24"]


def result(case=CASE):
    return fastsep.separable_conv2d(**case.tensors(), **case.options)


def gradients(case):
    """Of all that has one, by the native backward pass."""
    tensors = case.tensors()
    needed = [tensor.requires_grad_() for tensor in tensors.values() if tensor is not None]
    y = fastsep.separable_conv2d(**tensors, **case.options)
    return torch.autograd.grad(y, needed, case.gradient())


@pytest.fixture
def own_pool():
    """The native module's own threads instead of torch's."""
    _native.take_pool_back()
    yield
    _native.lend_pool()


@needs_native
def test_pools_are_lent_and_taken_back(own_pool):
    assert _native.own_pool
    assert _native.core.thread_pool() == "own"
    assert _native.lend_pool()
    assert not _native.own_pool
    assert _native.core.thread_pool() == "torch"
    _native.take_pool_back()
    assert _native.core.thread_pool() == "own"


@needs_native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["stride_2", "seven_by_seven", "many_images", "mobilenet_v1_first"])
def test_both_pools_give_the_same_bits(name, own_pool, native_backward_calls):
    case = BY_NAME[name]
    for threads in (1, 2, 3, 7, 1):
        torch.set_num_threads(threads)
        _native.take_pool_back()
        ours = result(case), *gradients(case)
        _native.lend_pool()
        theirs = result(case), *gradients(case)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(native_backward_calls) == 10


@needs_native
def test_torch_without_an_exported_pool(monkeypatch, own_pool):
    """Before torch 2.10, and where its library lies elsewhere."""

    class Library:
        def __init__(self, name):
            if name is not None:
                raise OSError(name)

    monkeypatch.setattr(_native.ctypes, "CDLL", Library)
    assert not _native.lend_pool()
    assert _native.own_pool
    assert result().isfinite().all()


@needs_native
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("pool", ["torch", "own"])
def test_eight_threads_on_one_layer(pool, own_pool):
    if pool == "torch":
        _native.lend_pool()
    torch.set_num_threads(2)
    layer = SeparableConv2d(32, 48, 3, padding=1, mid_activation="silu")
    frozen = SeparableConv2d(32, 48, 3, padding=1, mid_activation="silu").freeze()
    inputs = [torch.randn(1 + i % 3, 32, 20, 21) for i in range(8)]
    inputs = [x.contiguous(memory_format=torch.channels_last) if i % 2 else x for i, x in enumerate(inputs)]
    with torch.no_grad():
        expected = [(layer(x), frozen(x)) for x in inputs]
    case = replace(BY_NAME["stride_2"], n=3)
    slopes = gradients(case)
    together = threading.Barrier(8)

    def work(i):
        together.wait()
        with torch.no_grad():
            outputs = all(
                torch.equal(layer(inputs[i]), expected[i][0])
                and torch.equal(frozen(inputs[i]), expected[i][1])
                for _ in range(50)
            )
        return outputs and all(
            torch.equal(a, b) for _ in range(10) for a, b in zip(gradients(case), slopes, strict=True)
        )

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(work, range(8)))


@needs_native
def test_gil_is_released():
    """Another thread gets on while a long call runs: it wakes several times during each."""
    torch.set_num_threads(1)
    x = torch.randn(4, 64, 160, 160)
    layer = SeparableConv2d(64, 64, 5, padding=2).requires_grad_(False)
    wakes, calls, stop = 0, 0, threading.Event()

    def watch():
        nonlocal wakes
        while not stop.is_set():
            time.sleep(0.001)
            wakes += 1

    layer(x)
    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.3 or calls < 10:
        layer(x)
        calls += 1
    stop.set()
    watcher.join()
    # With the GIL held the watcher would wake once per call, some 30 ms apart, at best.
    assert wakes > 3 * calls


@needs_native
def test_last_isa_is_that_of_the_thread():
    result()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(_native.core.last_isa()))
    thread.start()
    thread.join()
    assert seen == [""]
    assert _native.core.last_isa() == _native.core.best_isa()


FORK = """
import os, sys, torch, fastsep
torch.set_num_threads(2)
layer = fastsep.SeparableConv2d(64, 64, 3, padding=1).requires_grad_(False)
trained = fastsep.SeparableConv2d(64, 64, 3, padding=1)
x = torch.randn(2, 64, 40, 40)
before = layer(x)
def gradients():
    return [g.numpy() for g in torch.autograd.grad(trained(x), list(trained.parameters()), before)]
slopes = gradients()
for generation in range(2):
    child = os.fork()
    if child == 0:
        same = all((layer(x).numpy() == before.numpy()).all() for _ in range(3))
        same = same and all((a == b).all() for a, b in zip(gradients(), slopes))
        sys.stdout.write(f"{fastsep._native.core.thread_pool()} {same}\\n")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
print("torch", torch.equal(layer(x), before))
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child():
    """torch's own operators hang in a child when the parent has used GNU OpenMP. Ours do not."""
    result = run(f"timeout 60 {sys.executable} -W ignore -c '{FORK}'")
    assert result.stdout.split("\n") == ["own True", "own True", "torch True", ""], result.stderr


def test_import_is_quick():
    """Some 16 ms, 2 % of what torch takes; told as a share, for machines that are slow or busy.

    With byte code, which the first run writes where an installation has not.
    """
    program = (
        "import time; a = time.process_time(); import torch; b = time.process_time(); import fastsep; "
        "print((time.process_time() - b) / (b - a))"
    )
    command = f'PYTHONDONTWRITEBYTECODE= {sys.executable} -c "{program}"'
    assert min(float(run(command).stdout) for _ in range(4)) < 0.03


def test_import_starts_no_threads_and_reads_no_file_of_users():
    program = (
        "import sys, torch.utils.flop_counter, threading; before = set(sys.modules); import fastsep; "
        "print(threading.active_count(), sorted(m for m in set(sys.modules) - before "
        'if not m.startswith(("fastsep", "torch"))))'
    )
    assert run(f"{sys.executable} -c '{program}'").stdout == "1 []\n"


HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "fastsep._core":
            raise ImportError("hidden for a test", name=name)
sys.meta_path.insert(0, Hide())
import torch, fastsep
assert fastsep._native.core is None
torch.manual_seed(0)
layer = fastsep.SeparableConv2d(4, 6, 3, stride=2, padding="same", mid_activation="relu6")
x = torch.arange(2 * 4 * 7 * 7.0).view(2, 4, 7, 7).sin()
y = layer(x)
y.sum().backward()
assert layer.depthwise.weight.grad.abs().sum() > 0
layer.freeze()
assert torch.equal(layer(x), y) and layer._packed is None
print(*layer(x).flatten()[:5].tolist())
"""


def test_without_the_native_module():
    """No compiler, another platform: the import works, and so does all the rest."""
    hidden = run(f"{sys.executable} -c '{HIDDEN}'", FASTSEP_VERBOSE="1")
    assert hidden.returncode == 0, hidden.stderr
    torch.manual_seed(0)
    layer = SeparableConv2d(4, 6, 3, stride=2, padding="same", mid_activation="relu6")
    x = torch.arange(2 * 4 * 7 * 7.0).view(2, 4, 7, 7).sin()
    got = torch.tensor([float(number) for number in hidden.stdout.split()])
    torch.testing.assert_close(got, layer(x).flatten()[:5].detach(), rtol=1e-4, atol=1e-5)
    assert "composition | native module missing: hidden for a test" in hidden.stderr


@needs_native
def test_small_call_costs_little():
    """Against the two convolutions that it replaces, whose overhead is about three times ours."""
    layer, x = SeparableConv2d(8, 8, 3, padding=1), torch.randn(1, 8, 4, 4)
    torch.set_num_threads(1)

    def calls(function):
        def hundred():
            for _ in range(100):
                function(x)

        return hundred

    with torch.no_grad():
        ours, theirs = best_in_turns(calls(layer), calls(layer._call_children), turns=20)
    assert ours < 0.5 * theirs
