"""fastsep.optimize: what may change about a model afterwards, and what else its forward may do."""

from __future__ import annotations

from collections import OrderedDict, deque

import pytest
import torch
import torch.nn.functional as F
from optimizing import Block, X, check, made, settled, targets_of
from test_optimize_surroundings import Residual, expanded_steps
from torch import nn

import fastsep
from fastsep import DepthwiseConv2d, SeparableConv2d, _native
from fastsep._optimize import plans, steps
from fastsep._optimize.steps import SeparableStep, remember

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


def agree(model, optimized, x=X):
    with torch.no_grad():
        torch.testing.assert_close(settled(optimized, x), model(x), rtol=1e-4, atol=1e-5)


class Gained(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * self.gain if "gain" in self._buffers else y


ADDED = {
    "buffer": lambda model: model.register_buffer("gain", torch.tensor(3.0)),
    "child": lambda model: model.between.append(nn.Tanh()),
    "parametrization": lambda model: nn.utils.parametrizations.weight_norm(model.pointwise, dim=None),
}


@pytest.mark.parametrize("what", ADDED)
def test_what_is_added(what):
    model = made(Gained())
    optimized = fastsep.optimize(model)
    for one in (model, optimized):
        ADDED[what](one)
    agree(model, optimized)


def vector(model):
    weights = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(weights * 1.5, model.parameters())


MOVED = {
    "child_and_back": lambda model: model.depthwise.bfloat16().float(),
    "data": lambda model: setattr(model.pointwise.weight, "data", torch.ones(8, 8, 1, 1)),
    "vector": vector,
}


@pytest.mark.parametrize("what", MOVED)
def test_weights_elsewhere_in_memory(what, pair):
    model, optimized = pair
    with torch.no_grad():
        for one in (model, optimized):
            MOVED[what](one)
    with torch.no_grad():
        assert (settled(optimized) - model(X)).abs().max() < 1e-5


class Plain(nn.Module):
    """Its weights are no parameters."""

    def __init__(self):
        super().__init__()
        self.weight, self.pointwise = torch.randn(8, 1, 3, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.pointwise(F.conv2d(x, self.weight, groups=8))


@pytest.mark.parametrize("change", [lambda m: m.weight.mul_(3), lambda m: setattr(m, "weight", m.weight * 2)])
def test_tensors_that_are_no_parameters(change, native_steps):
    model = made(Plain())
    optimized = fastsep.optimize(model)
    for one in (model, optimized):
        change(one)
    agree(model, optimized)
    assert native_steps


def test_plain_tensors_get_gradients():
    optimized = fastsep.optimize(made(Plain()))
    optimized.weight.requires_grad_()
    optimized(X).sum().backward()
    assert optimized.weight.grad is not None


def test_parameters_as_inputs():
    model = made(Block())
    optimized = fastsep.optimize(model)
    gradients = []
    for one in (model, optimized):
        x = nn.Parameter(X.clone())
        one(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)

    class Scaled(Block):
        def forward(self, x, scale):
            return super().forward(x) * scale

    optimized = fastsep.optimize(made(Scaled()))
    scale = torch.ones(1, requires_grad=True)
    assert optimized(nn.Parameter(X, requires_grad=False), scale).requires_grad


def test_a_forward_of_the_models_own():
    model = made(Block())
    own = model.forward = lambda x: 2 * Block.forward(model, x)
    optimized, (reason,) = check(model, fused=0)
    assert reason == "the model has a forward of its own"
    assert fastsep.revert(fastsep.optimize(model, inplace=True)).forward is own
    assert optimized.forward is own


def test_a_forward_that_came_later_stays(pair):
    _, optimized = pair
    own = optimized.forward = lambda x: x
    assert fastsep.revert(optimized).forward is own


def test_new_weights_are_verified(pair, monkeypatch, native_steps):
    """With them a pair may differ too much; then it is left, and stays so."""
    model, optimized = pair
    call = SeparableStep.__call__
    monkeypatch.setattr(SeparableStep, "__call__", lambda self, x: call(self, x) * 1.01)
    for _ in range(2):
        for one in (model, optimized):
            with torch.no_grad():
                one.pointwise.weight.mul_(2)
        agree(model, optimized)
        monkeypatch.setattr(SeparableStep, "__call__", call)
    left = optimized.__dict__["forward"].make.left
    assert left["depthwise"].startswith("differs by ")


def test_what_fails_to_be_verified_is_left(monkeypatch):
    def fail(reader, match):
        raise ZeroDivisionError("no\nmore")

    monkeypatch.setattr(plans, "match_error", fail)
    _, (reason,) = check(made(Block()), fused=0)
    assert reason == "could not be compared: no"


@pytest.mark.parametrize(
    ("layer", "child"),
    [
        (SeparableConv2d(8, 8, 3, padding=1), DepthwiseConv2d(8, 8, 3, padding=1, activation="relu")),
        (SeparableConv2d(8, 8, 3, padding=((0, 2), (1, 1))), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        (SeparableConv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)),
    ],
    ids=["activation", "padding", "dense"],
)
def test_replaced_children_of_layers(layer, child):
    model = nn.Sequential(layer, nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    layer.depthwise = child
    _, (reason,) = check(made(model), verify=False)
    assert reason == "the children of 0 are no plain depthwise and pointwise convolution"


@pytest.mark.parametrize("shared", [nn.ReLU(), nn.Identity()], ids=str)
def test_hooks_on_shared_modules_that_came_later(shared):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.pointwise, self.shared, self.tanh = nn.Conv2d(8, 8, 1), shared, nn.Tanh()

        def forward(self, x):
            y = self.pointwise(self.shared(self.depthwise(x)))
            return self.tanh(self.shared(x + y))

    model = made(Shared())
    optimized = fastsep.optimize(model)
    counts = [0, 0]
    for index, one in enumerate((model, optimized)):

        def hook(module, args, result, index=index):
            counts[index] += 1
            return 2 * result

        one.shared.register_forward_hook(hook)
    agree(model, optimized)
    assert counts == [2, 3 * 2]


WRITES = {
    "view": lambda x: x.view(x.shape[0], -1).add_(1),
    "slice": lambda x: x[:, 1:].add_(1),
    "detach": lambda x: x.detach().add_(1),
    "out": lambda x: torch.mul(x, 2, out=x),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("before", [False, True])
def test_writes_before_the_sum(how, before):
    """What is summed is not what the block has read; writes before the block do not matter."""

    class Writes(Residual):
        def forward(self, x):
            x = x * 1
            if before:
                WRITES[how](x)
            y = self.project(self.depthwise(self.norm(self.expand(x))))
            if not before:
                WRITES[how](x)
            return x + y

    optimized, _ = check(made(Writes()))
    (step,) = expanded_steps(optimized)
    assert (step.sum_with_input, step.residual) == (before, False)


@pytest.mark.parametrize(
    ("options", "size"),
    [({"stride": 2}, (2, 8, 1, 1)), ({"padding": 0}, (2, 8, 3, 3)), ({"padding": (1, 0)}, (2, 8, 4, 3))],
    ids=str,
)
def test_sums_of_other_sizes(options, size):
    """The sum broadcasts, or the sizes are the same by chance."""
    model, x = made(Residual(**options)), torch.randn(size)
    optimized = fastsep.optimize(model)
    agree(model, optimized, x)
    (step,) = expanded_steps(optimized)
    assert not step.sum_with_input


@pytest.mark.parametrize(
    ("seen", "add"),
    [
        ([], lambda seen, y: seen.append(y)),
        ({}, lambda seen, y: seen.update(last=y)),
        (set(), lambda seen, y: seen.add(y)),
        (deque([1, 2], maxlen=2), lambda seen, y: seen.append(y)),
        ([1], lambda seen, y: seen.__setitem__(0, y)),
    ],
    ids=str,
)
def test_forwards_that_keep_something(seen, add):
    class Keeps(Block):
        def forward(self, x):
            y = super().forward(x)
            add(self.seen, y)
            return y

    model = made(Keeps())
    model.seen = seen
    optimized = fastsep.optimize(model)
    (candidate,) = fastsep.report(optimized).left
    assert candidate.reason == "the model could not be traced: it writes to the module"
    assert optimized.seen == seen
    optimized(X)
    kept = optimized.seen.values() if isinstance(seen, dict) else optimized.seen
    assert any(isinstance(y, torch.Tensor) for y in kept)


@pytest.mark.parametrize("compute", [lambda y: y.mean((2, 3)), lambda y: F.adaptive_avg_pool2d(y, 1)])
def test_results_on_other_devices(compute):
    class Elsewhere(Block):
        def forward(self, x):
            return compute(super().forward(x).to("meta"))

    optimized = fastsep.optimize(made(Elsewhere()))
    with torch.no_grad():
        assert optimized(X).device.type == "meta"


def test_steps_read_no_memory_but_the_cpus():
    (step,) = targets_of(fastsep.optimize(made(Block())))
    expected = step(X)
    with pytest.raises(RuntimeError, match=r"input must be a dense tensor on the CPU, got .* on meta"):
        step(X.to("meta"))
    torch.testing.assert_close(step(torch._neg_view(-X)), expected)


@pytest.mark.parametrize("hooked", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_hooked_module_gets_what_it_got_before(hooked, kept):
    """Its forward, or the hook, may ask for views."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8 * 9 * 10, 5)

        def forward(self, x):
            return self.linear(x.view(x.size(0), -1))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Block(), Head()

        def forward(self, x):
            y = self.block(x)
            return self.head(y) + (y.mean() if kept else 0)

    model = made(Whole())
    getattr(model.head, hooked)(lambda *args: None)
    optimized, _ = check(model)
    assert fastsep.report(optimized).channels_last != kept


def test_ordered_results():
    class Named(Block):
        def forward(self, x):
            y = super().forward(x)
            return OrderedDict(out=y, aux=[y + 1])

    model = made(Named())
    optimized = fastsep.optimize(model)
    assert fastsep.report(optimized).fused
    with torch.no_grad():
        got, expected = optimized(X), model(X)
    assert type(got) is OrderedDict
    assert list(got) == ["out", "aux"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dictionaries_of_other_kinds():
    class Output(dict):
        pass

    class Named(Block):
        def forward(self, x):
            return Output(out=super().forward(x))

    (candidate,) = fastsep.report(fastsep.optimize(made(Named()))).candidates
    assert candidate.reason == "the model could not be traced: it makes a Output"


@pytest.mark.parametrize("asks", [torch.is_grad_enabled, torch.is_inference_mode_enabled])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_forwards_that_ask_for_gradients(asks, mode):
    class Asks(Block):
        def forward(self, x):
            y = super().forward(x)
            return y * 2 if asks() else y

    optimized = fastsep.optimize(made(Asks()), mode=mode)
    (candidate,) = fastsep.report(optimized).candidates
    assert candidate.reason == "the model could not be traced: it asks whether gradients are recorded"


def test_one_image_through_a_head():
    """A mean that keeps its dimensions, and then is flattened from the second on."""
    pair = nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    model = made(nn.Sequential(*pair, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert model(X[0]).shape == (4, 1)
    check(model, X[0])


def test_a_stem_whose_norm_is_not_finite():
    pair = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
    model = made(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), *pair))
    with torch.no_grad():
        model[1].weight[0] = torch.nan
        x = torch.randn(1, 3, 9, 9)
        got, expected = fastsep.optimize(model, verify=False)(x), model(x)
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert got.isnan().any()


@pytest.mark.parametrize("options", [{"padding": (1,)}, {"stride": (2,), "dilation": (1,)}], ids=str)
def test_sizes_of_one_number(options):
    check(made(nn.Sequential(nn.Conv2d(8, 8, (3, 3), groups=8, **options), nn.Conv2d(8, 8, 1))))


@pytest.mark.filterwarnings("ignore")
def test_scripting_says_what_to_do(pair):
    model = made(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)))
    optimized = fastsep.optimize(model)
    with pytest.raises(Exception, match=r"an optimized model cannot be scripted: revert\(\) it"):
        torch.jit.script(optimized)
    torch.testing.assert_close(torch.jit.script(fastsep.revert(optimized))(X), model(X))


def test_example_inputs():
    optimized = fastsep.optimize(made(Block()), X.clone().requires_grad_() * 2)
    assert fastsep.report(optimized).error < 1e-5
    with pytest.raises(TypeError, match="example_inputs must be a tensor or a tuple of arguments, got list"):
        fastsep.optimize(made(Block()), [X])


def test_caches_lose_their_oldest():
    cache = {}
    for key in range(5):
        remember(cache, key, -key, 3)
    assert cache == {2: -2, 3: -3, 4: -4}
    optimized = fastsep.optimize(made(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))))
    (step,) = targets_of(optimized)
    for width in range(3, 4 + steps._REMEMBERED):
        step(X.new_zeros(1, 8, 4, width))
    assert len(step.calls) == steps._REMEMBERED
    assert min(shape[3] for shape, _ in step.calls) == 4


def test_a_branch_that_pools_is_no_gate():
    class Pyramid(Block):
        def forward(self, x):
            y = self.depthwise(x)
            return self.pointwise(y) + self.behind(F.adaptive_avg_pool2d(y, 1))

    _, (reason,) = check(made(Pyramid()), fused=0)
    assert reason == "what lies behind depthwise is used 2 times"


def test_dictionaries_of_modules_with_a_forward():
    """As torchvision's IntermediateLayerGetter."""

    class Getter(nn.ModuleDict):
        def forward(self, x):
            results = OrderedDict()
            for name, module in self.items():
                results[name] = x = module(x)
            return results

    optimized = fastsep.optimize(made(Getter({"a": Block(), "b": Block()})))
    assert len(fastsep.report(optimized).fused) == 2
    assert "forward" in optimized.__dict__
