"""What may happen to a model after fastsep.optimize: new weights, other calls, copies, exports."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import weakref

import pytest
import torch
from commands import run
from networks import network
from optimizing import Block, X, check, made, settled
from timing import best_in_turns
from torch import nn

import fastsep
from fastsep import _native
from fastsep._case import parse_case
from fastsep._optimize.plans import Maker

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


CHANGES = {
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "assign": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "child": lambda model, other: model.depthwise.load_state_dict(other.depthwise.state_dict()),
    "write": lambda model, other: (model.pointwise.weight.mul_(2), model.pointwise.bias.add_(1)),
    "replaced_child": lambda model, other: setattr(model, "pointwise", other.pointwise),
    "statistics": lambda model, other: model.behind.running_mean.add_(1),
    "half_and_back": lambda model, other: model.bfloat16().float(),
    "hook": lambda model, other: model.between.register_forward_hook(lambda m, x, y: y * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_count(change, pair, native_steps):
    model, optimized = pair
    for one in (model, optimized):
        with torch.no_grad():
            CHANGES[change](one, made(Block(), seed=1))
    with torch.no_grad():
        torch.testing.assert_close(settled(optimized), model(X), rtol=1e-4, atol=1e-5)
    assert bool(native_steps) == (change != "hook")


def test_double(pair, native_steps):
    model, optimized = pair
    optimized.double()
    torch.testing.assert_close(settled(optimized, X.double()), model.double()(X.double()).detach())
    assert native_steps


def test_training_and_back(pair, native_steps):
    model, optimized = pair
    with pytest.warns(UserWarning, match=r"this Block was optimized for inference.* revert\(\) it to train"):
        optimized.train()
    for one in (model, optimized):
        one.train()(X)
        one.eval()
    assert not native_steps
    torch.testing.assert_close(settled(optimized), model(X).detach(), rtol=1e-4, atol=1e-5)
    assert native_steps


def test_one_norm_trains(pair, native_steps):
    model, optimized = pair
    for one in (model, optimized):
        one.behind.train()
        assert one.training is False
    with torch.no_grad():
        assert torch.equal(settled(optimized), settled(model))
    assert not native_steps


def test_a_layer_that_is_the_same_in_training(pair, native_steps):
    model, optimized = pair
    optimized.depthwise.train()
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-5)
    assert native_steps


def test_a_model_that_nobody_holds_is_freed():
    optimized = fastsep.optimize(made(Block()))
    settled(optimized)
    weight = weakref.ref(optimized.pointwise.weight)
    del optimized
    gc.collect()
    assert weight() is None


def test_functional_call(pair):
    model, optimized = pair
    other = {name: parameter + 1 for name, parameter in model.named_parameters()}
    for _ in range(2):
        with torch.no_grad():
            got, expected = (torch.func.functional_call(m, other, (X,)) for m in (optimized, model))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-5)


def test_gradients_of_the_input(pair):
    model, optimized = pair
    gradients = []
    for one in (model, optimized):
        x = X.clone().requires_grad_()
        one(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_parameters_that_are_thawed_get_gradients(pair):
    _, optimized = pair
    assert not any(parameter.requires_grad for parameter in optimized.parameters())
    optimized.pointwise.weight.requires_grad_()
    optimized(X).sum().backward()
    assert optimized.pointwise.weight.grad is not None


def test_no_plans_for_weights_that_train(pair, monkeypatch):
    model, optimized = pair
    monkeypatch.delattr(Maker, "__call__")
    for one in (model, optimized):
        one.requires_grad_()
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            for part in X.split(1) * 2:
                one(part).square().mean().backward()
            optimizer.step()
    assert torch.equal(optimized.pointwise.weight, model.pointwise.weight)


@pytest.mark.filterwarnings("ignore")
def test_watched_calls_take_the_models_own_forward(pair, native_steps):
    model, optimized = pair
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(optimized(X), model(X))
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        optimized(X)
    assert counter.get_total_flops() == 2 * X.numel() * (9 + 8)
    torch.testing.assert_close(torch.vmap(optimized)(X[None]), model(X)[None].detach())
    torch.testing.assert_close(torch.jit.trace(optimized, X, check_trace=False)(X), model(X))
    assert not native_steps


def test_profiler_sees_the_steps(pair):
    _, optimized = pair
    with torch.profiler.profile() as profile, torch.no_grad():
        optimized(X)
    assert "fastsep: depthwise" in {event.key for event in profile.key_averages()}


def test_verbose_prints_each_step():
    program = (
        "import torch, fastsep; from fastsep._networks import load; m = load('mobilenet_v1')[0]; "
        "fastsep.optimize(m, verify=False)(torch.randn(1, 3, 32, 32))"
    )
    result = run(f'python -c "{program}"', FASTSEP_VERBOSE="1")
    lines = [line for line in result.stderr.splitlines() if line.startswith("fastsep: native")]
    assert len(lines) == 13 + 2, result.stderr  # the pairs, the mean and the linear layer
    assert "behind a 3 x 3 convolution of 3 channels, weights frozen" in lines[0]
    case = parse_case(lines[0])
    assert (case.c, case.h, case.k, case.mid, case.layout) == (32, 16, 64, "relu", "nhwc")


def test_python_does_little():
    """All steps are one native call, with a few Python functions around it."""
    optimized = fastsep.optimize(network("mobilenet_v1"))
    x = torch.randn(1, 3, 32, 32)
    calls = []
    with torch.inference_mode():
        optimized(x)
        sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code))
        try:
            optimized(x)
        finally:
            sys.setprofile(None)
    ours = [code.co_name for code in calls if "fastsep" in code.co_filename]
    assert 0 < len(ours) < 15, ours
    assert len(calls) < 40


def test_checks_take_little_time(threads):
    """Of what each call asks before it runs: less than a twentieth of MobileNetV1's time, in both modes."""
    torch.set_num_threads(1)
    optimized = fastsep.optimize(network("mobilenet_v1"), verify=False)
    forward = optimized.__dict__["forward"]
    x = torch.randn(1, 3, 224, 224)

    def checks():
        assert forward._is_plain_inference((x,))
        assert forward._plan().programs is not None

    def checks_without_gradients():
        with torch.no_grad():
            checks()

    def whole():
        with torch.no_grad():
            optimized(x)

    assert best_in_turns(checks_without_gradients)[0] < best_in_turns(whole, turns=5)[0] / 20
    # One more question for each tensor, to its own attribute: a third of what the state asks of it.
    without, with_gradients = best_in_turns(checks_without_gradients, checks)
    assert with_gradients < 1.6 * without


def test_other_inputs(pair):
    """Sizes, formats and views; 3-d and wrong ones mean what they meant."""
    model, optimized = pair
    inputs = [
        X[:, :, 1:, 2:],
        X.to(memory_format=torch.channels_last),
        X[:0],
        X.transpose(2, 3),
        X[:1].expand(3, -1, -1, -1),
        torch._neg_view(X),
    ]
    for x in inputs:
        with torch.no_grad():
            got, expected = optimized(x), model(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            assert got.stride() == expected.stride()
    for wrong in (X[:, :7], X.double(), X[0, 0]):
        with pytest.raises(RuntimeError):
            optimized(wrong)
    torch.testing.assert_close(optimized(X), model(X).detach(), rtol=1e-4, atol=1e-5)


def test_input_without_a_batch():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    check(made(model), X[0])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(how, pair, native_steps):
    model, optimized = pair
    copied = how(optimized)
    with torch.no_grad():
        copied.pointwise.weight.mul_(2)
    native_steps.clear()
    torch.testing.assert_close(optimized(X), model(X).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(copied(X), model(X))
    assert len(native_steps) == 3  # the copy's new plan was compared with its model
    assert fastsep.report(copied).fused
    assert "forward" not in fastsep.revert(copied).__dict__
    assert "forward" in optimized.__dict__


def test_checkpoint_is_loaded_with_weights_only(pair):
    model, optimized = pair
    file = io.BytesIO()
    torch.save(optimized.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))


def test_in_place_and_copy():
    model = made(Block())
    before = model.__dict__.copy()
    optimized = fastsep.optimize(model)
    assert optimized is not model
    assert model.__dict__ == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert fastsep.optimize(model, inplace=True) is model
    fastsep.revert(model)
    assert model.__dict__ == before
    assert all(parameter.requires_grad for parameter in model.parameters())
