"""fastsep.optimize with several threads, and in other processes."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from functools import partial

import pytest
import torch
from commands import ROOT, run
from optimizing import Block, X, made, settled
from torch import nn

import fastsep
from fastsep import _native
from fastsep._optimize import trace

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


def together(*functions):
    """Calls them at the same time, each in a thread of its own; the results, or what was raised."""
    barrier = threading.Barrier(len(functions))
    results = [None] * len(functions)

    def work(index):
        barrier.wait()
        try:
            with torch.no_grad():
                results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def chain():
    """A model of some blocks, its optimized copy, and its result."""
    model = made(nn.Sequential(*[Block() for _ in range(6)]))
    with torch.no_grad():
        return model, fastsep.optimize(model), model(X)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_first_calls_of_copies(how, chain):
    """torch.fx patches nn.Module while it traces: one thread at a time, and others do not notice."""
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    for _ in range(3):
        for result in together(*[partial(how(chain[1]), X) for _ in range(4)]):
            torch.testing.assert_close(result, chain[2], rtol=1e-4, atol=1e-5)
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is getattribute


def test_another_model_meanwhile(chain):
    plain = made(nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]))
    row = torch.ones(1, 8)
    with torch.no_grad():
        expected = plain(row)
    done = threading.Event()

    def serve():
        count = 0
        while not done.is_set() or not count:
            assert torch.equal(plain(row), expected)
            count += 1
        return count

    def optimize():
        try:
            return [fastsep.optimize(chain[0], verify=False)(X) for _ in range(5)]
        finally:
            done.set()

    count, results = together(serve, optimize)
    assert isinstance(count, int), count
    for result in results:
        torch.testing.assert_close(result, chain[2], rtol=1e-4, atol=1e-5)


def test_one_model_in_four_threads(chain):
    """On inputs of several sizes, the first of which each thread brings."""
    model, optimized, _ = chain
    inputs = [torch.randn(2, 8, 9, width) for width in range(5, 13)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]

    def work(first):
        return [(i, optimized(inputs[i])) for _ in range(5) for i in (*range(first, 8), *range(first))]

    for results in together(*[lambda first=first: work(2 * first) for first in range(4)]):
        for index, result in results:
            torch.testing.assert_close(result, expected[index], rtol=1e-4, atol=1e-5)


def test_a_stranger_draws_numbers(monkeypatch, native_steps):
    """While the graph is made: once is no reason to leave the model for good."""
    tracer, drawn = trace.Tracer.trace, []

    def draw_once(self, module):
        if not drawn:
            drawn.append(random.random())
        return tracer(self, module)

    monkeypatch.setattr(trace.Tracer, "trace", draw_once)
    optimized = fastsep.optimize(made(Block()))
    assert drawn
    assert fastsep.report(optimized).fused


def test_new_weights_are_not_traced_again(pair, monkeypatch, native_steps):
    model, optimized = pair
    monkeypatch.delattr(trace, "_trace")
    for one in (model, copied := copy.deepcopy(optimized)):
        with torch.no_grad():
            one.pointwise.weight.mul_(2)
    torch.testing.assert_close(settled(copied), model(X).detach(), rtol=1e-4, atol=1e-5)
    assert native_steps


@pytest.mark.parametrize("name", ["mobilenet_v2", "torchvision/mobilenet_v3_large"])
def test_networks_on_every_instruction_set(name, isa):
    """With two threads, and on channels-last input, whose format the result keeps."""
    program = (
        "import sys, torch, fastsep; from networks import network; torch.set_num_threads(2); "
        "model = network(sys.argv[1]); x = torch.randn(2, 3, 64, 65).to(memory_format=torch.channels_last); "
        "optimized = fastsep.optimize(model, x); torch.set_grad_enabled(False); expected = model(x); "
        "limit = 1e-5 * expected.abs().max().item(); "
        "torch.testing.assert_close(optimized(x), expected, rtol=0, atol=limit); "
        "torch.testing.assert_close(optimized(x.contiguous()), expected, rtol=0, atol=limit); "
        "print(fastsep._native.core.last_isa(), fastsep.report(optimized).error < 1e-5)"
    )
    result = run(f'python -c "{program}" {name}', FASTSEP_ISA=isa, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert result.stdout.split() == [isa, "True"], result.stderr


def test_unpickling_in_another_process(tmp_path):
    model = made(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    with torch.no_grad():
        torch.save((fastsep.optimize(model), X, model(X)), tmp_path / "model.pt")
    program = (
        "import sys, torch, fastsep; model, x, expected = torch.load(sys.argv[1], weights_only=False); "
        "torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5); "
        "assert model.__dict__['forward']._plans[0].programs.contiguous is not None; "
        "print(len(fastsep.report(model).fused))"
    )
    result = run(f'python -c "{program}" {tmp_path / "model.pt"}')
    assert (result.returncode, result.stdout.strip()) == (0, "1"), result.stderr
