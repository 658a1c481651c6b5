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
from fastsep._optimize.live import LiveStep

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


def test_buffers_on_the_meta_device():
    model = Block().eval()
    model.behind.to("meta")
    model.behind.weight = model.behind.bias = None
    unharmed(model, ValueError, r"got behind\.running_mean on the meta device")


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(8, 1), nn.LazyBatchNorm2d(affine=False)], ids=str)
def test_lazy_layers(lazy):
    with pytest.raises(ValueError, match=r"model must have been called once, got 0\.\w+ of a lazy layer"):
        fastsep.optimize(nn.Sequential(lazy, Block()).eval(), inplace=True)


def test_tensors_of_inference_mode():
    """Writes to them cannot be seen: neither at first nor when they come later."""
    with torch.inference_mode():
        model = made(Block())
        with pytest.raises(ValueError, match=r"got depthwise\.weight made in torch\.inference_mode"):
            fastsep.optimize(model)
    optimized = fastsep.optimize(made(Block(), seed=1))
    with torch.inference_mode():
        optimized.load_state_dict(model.state_dict(), assign=True)
        settled(optimized)
        for one in (model, optimized):
            one.pointwise.weight.mul_(3)
        torch.testing.assert_close(settled(optimized), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
@pytest.mark.filterwarnings("ignore")
def test_script_modules(script):
    with pytest.raises(TypeError, match="with a forward in Python, got a ScriptModule"):
        fastsep.optimize(script(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)).eval()))


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.Conv2d(8, 8, 3, groups=8), "the model"), (fastsep.SeparableConv2d(8, 8, 3), "depthwise")],
)
def test_a_single_layer(layer, name):
    (candidate,) = fastsep.report(fastsep.optimize(layer.eval())).candidates
    assert (candidate.name, candidate.reason) == (name, f"the model itself is one {type(layer).__name__}")


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
        steps.SeparableStep,
        "__call__",
        lambda self, x, *rest: call(self, x, *rest) * (1.01 if x.shape == X.shape else 1),
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
    assert "forward" not in optimized.__dict__


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


def test_training_of_a_network(native_calls):
    """Outputs, gradients and statistics are the model's. (Dropout is off: both would draw other numbers.)"""
    model = network("timm/legacy_xception").train()
    optimized = fastsep.optimize(model, mode="training", verify=False)
    report = fastsep.report(optimized)
    assert len(report.fused) == len(report.candidates) == 34
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    results, gradients = [], []
    for one in (model.double(), optimized.double()):
        y = one(x.double())
        y.square().mean().backward()
        results.append(y.detach())
        gradients.append({name: parameter.grad for name, parameter in one.named_parameters()})
    assert len(native_calls) == 34
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    for name, expected in gradients[0].items():
        limit = 1e-9 * expected.abs().max().item()
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=limit, msg=name)
    for name, expected in model.named_buffers():
        torch.testing.assert_close(optimized.get_buffer(name), expected, rtol=1e-9, atol=1e-12, msg=name)


class Noisy(Block):
    """In training it draws numbers, and its norm counts the calls."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), training=self.training)


def test_training_is_compared(monkeypatch):
    """With the model as it is: training. It sees nothing of that."""
    torch.manual_seed(0)
    model = Noisy(between=nn.ReLU())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = torch.get_rng_state()
    optimized = fastsep.optimize(model, X, mode="training")
    assert fastsep.report(optimized).error < 1e-5
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(before[name], tensor) for name, tensor in optimized.state_dict().items())
    call = LiveStep.__call__
    monkeypatch.setattr(
        LiveStep,
        "__call__",
        lambda self, x: call(self, x) * (torch.arange(8.0)[:, None, None] if x.shape == X.shape else 1),
    )
    unharmed(model, RuntimeError, "must give the same result", example_inputs=X, mode="training")


def test_training_of_what_is_partly_without_gradients():
    """A graph would not tell."""

    class Frozen(Block):
        def forward(self, x):
            with torch.no_grad():
                y = super().forward(x)
            return y + x

    optimized = fastsep.optimize(Frozen(between=nn.ReLU()), mode="training")
    (candidate,) = fastsep.report(optimized).left
    assert candidate.reason == "the model could not be traced: it computes a part without gradients"
    check(made(Frozen()))


def test_training_under_autocast(native_calls):
    model = Block(between=nn.ReLU())
    optimized = fastsep.optimize(model.train(), mode="training", verify=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(optimized(X), model(X))
    assert not native_calls


def test_training_leaves_norms_that_do_not_train():
    model = made(Block())
    optimized = fastsep.optimize(model, mode="training")
    (candidate,) = fastsep.report(optimized).candidates
    assert candidate.reason == "a norm between, which is folded for inference only"
