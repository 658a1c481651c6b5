"""fastsep.optimize on models that it must leave alone, and for training."""

from __future__ import annotations

import pytest
import torch
from networks import network
from optimizing import Block, X, check, made, settled
from torch import nn

import fastsep
from fastsep import _native
from fastsep._optimize import steps

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


# Bad input: a clear error or report, and the model unharmed.


def unharmed(model, error, message, **options):
    before = model.__dict__.copy()
    flags = [(p.requires_grad, p._version) for p in model.parameters()]
    for inplace in (False, True):
        with pytest.raises(error, match=message):
            fastsep.optimize(model, inplace=inplace, **options)
        assert model.__dict__ == before
        assert [(p.requires_grad, p._version) for p in model.parameters()] == flags


def test_training_mode():
    unharmed(Block(), ValueError, 'model must be in eval mode for mode="inference", got one where it trains')
    model = Block().eval()
    model.between[0].train()
    unharmed(model, ValueError, r"got one where its between\.0 trains")


def test_meta_device():
    unharmed(Block().eval().to("meta"), ValueError, r"got depthwise\.weight on the meta device")


def test_no_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        fastsep.optimize(3)


def test_unknown_mode():
    unharmed(Block().eval(), ValueError, 'mode must be "inference" or "training", got \'fast\'', mode="fast")


def test_already_optimized(pair):
    _, optimized = pair
    unharmed(optimized, ValueError, "model must not be optimized already, got one where it is:")
    unharmed(nn.Sequential(optimized).eval(), ValueError, "got one where its 0 is: revert")


def test_example_inputs_that_do_not_fit():
    unharmed(made(Block()), RuntimeError, "channels", example_inputs=X[:, :3])


def test_a_wrong_result_is_an_error(monkeypatch):
    call = steps.SeparableStep.__call__
    monkeypatch.setattr(
        steps.SeparableStep, "__call__", lambda self, x: call(self, x) * (1.01 if x.shape == X.shape else 1)
    )
    unharmed(made(Block()), RuntimeError, "model must give the same result", example_inputs=X)


def test_a_wrong_pair_is_left(monkeypatch):
    call = steps.SeparableStep.__call__
    monkeypatch.setattr(steps.SeparableStep, "__call__", lambda self, x: call(self, x) * 1.01)
    _, (reason,) = check(made(Block()), fused=0)
    assert reason.startswith("differs by ")


def test_nothing_to_fuse():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    optimized = fastsep.optimize(model, inplace=True)
    assert "forward" not in optimized.__dict__
    assert str(fastsep.report(optimized)) == "Sequential: no depthwise convolution, nothing to fuse"
    fastsep.revert(optimized)
    for function in (fastsep.report, fastsep.revert):
        with pytest.raises(ValueError, match=r"model must be one that optimize\(\) returned, got Sequential"):
            function(optimized)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_without_a_kernel(dtype):
    optimized = fastsep.optimize(made(Block()).to(dtype))
    (candidate,) = fastsep.report(optimized).candidates
    assert candidate.reason == f"no native kernel for {dtype}"


def test_report_is_readable():
    optimized, _ = check(made(nn.Sequential(Block(), Block(between=nn.Mish()))))
    text = str(fastsep.report(optimized))
    assert text.splitlines()[0] == "Sequential: 1 of 2 fused for inference, channels-last"
    assert "1.depthwise" in text
    assert "no kernel for the activation Mish()" in text


# mode="training"


def test_training(native_calls):
    """Pairs with nothing between but an activation; gradients and statistics are those of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(between=nn.ReLU6()), Block())
    optimized = fastsep.optimize(model, mode="training")
    report = fastsep.report(optimized)
    assert [candidate.fused for candidate in report.candidates] == [True, False]
    assert report.candidates[1].reason == "batch statistics between"
    for step in range(3):
        for one in (model, optimized):
            optimizer = torch.optim.SGD(one.parameters(), 0.1)
            optimizer.zero_grad()
            one(X).square().mean().backward()
            optimizer.step()
        for name, expected in model.state_dict().items():
            got = optimized.state_dict()[name]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=f"{name} in step {step}")
    native_calls.clear()
    for one in (model, optimized):
        one.eval()
    torch.testing.assert_close(settled(optimized), model(X).detach(), rtol=1e-4, atol=1e-5)
    assert native_calls
    assert all(parameter.requires_grad for parameter in optimized.parameters())


HOOKS = "forward", "forward_pre", "full_backward", "full_backward_pre"


@pytest.mark.parametrize("kind", HOOKS)
def test_training_with_a_hook_that_came_later(kind):
    seen = []
    optimized = fastsep.optimize(Block(between=nn.ReLU()), mode="training")
    getattr(optimized.pointwise, f"register_{kind}_hook")(lambda *args: seen.append(args))
    for count in (1, 2, 3):
        optimized(X).sum().backward()
        assert len(seen) == count


def test_training_of_a_network():
    model = network("timm/legacy_xception").train()
    optimized = fastsep.optimize(model, mode="training", verify=False)
    report = fastsep.report(optimized)
    assert len(report.fused) == len(report.candidates) == 34


def test_training_leaves_norms_that_do_not_train():
    model = made(Block())
    optimized = fastsep.optimize(model, mode="training")
    (candidate,) = fastsep.report(optimized).candidates
    assert candidate.reason == "a norm between, which is folded for inference only"
