"""fastsep.optimize: what it finds, that the result is the same, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from commands import run
from networks import network, randomize_norms
from torch import nn

import fastsep
from fastsep import DepthwiseConv2d, SeparableConv2d, _native
from fastsep._case import parse_case
from fastsep._optimize import steps

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")

GATED = "squeeze-and-excite between"


@pytest.fixture
def native_steps(monkeypatch):
    """The names of the packed steps that ran."""
    calls = []
    call = steps._PackedStep.__call__

    def watched(self, x):
        calls.append(self.__name__)
        return call(self, x)

    monkeypatch.setattr(steps._PackedStep, "__call__", watched)
    return calls


@pytest.mark.parametrize(
    ("name", "fused", "count", "reasons"),
    [
        ("torchvision/mobilenet_v2", 17, 17, set()),
        ("torchvision/mnasnet1_0", 17, 17, set()),
        ("torchvision/shufflenet_v2_x1_0", 19, 19, set()),
        ("torchvision/mobilenet_v3_large", 7, 15, {GATED}),
        ("torchvision/efficientnet_b0", 0, 16, {GATED}),
        ("timm/mobilenetv1_100", 13, 13, set()),
        ("timm/efficientnet_lite0", 16, 16, set()),
        ("timm/tf_efficientnet_lite0", 16, 16, set()),  # TensorFlow's padding, which depends on the input
        ("timm/legacy_xception", 34, 34, set()),
    ],
)
def test_networks(name, fused, count, reasons, native_steps):
    model = network(name)
    x = torch.randn(2, 3, 96, 97, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(x)
    optimized = fastsep.optimize(model, x)
    report = fastsep.report(optimized)
    assert (len(report.fused), len(report.candidates)) == (fused, count)
    assert {candidate.reason for candidate in report.left} == reasons
    native_steps.clear()
    got = optimized(x)
    assert got.requires_grad == (not fused)
    limit = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=limit)
    assert len(native_steps) >= fused
    if fused:
        assert 0 < report.error < 1e-5
        assert 0 < max(candidate.error for candidate in report.fused) < 1e-5
        assert report.channels_last
    else:
        assert "forward" not in optimized.__dict__
        assert report.error is None
    # The keys and the numbers of the original, and its forward back.
    optimized.load_state_dict(model.state_dict())
    assert list(optimized.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fastsep.revert(optimized)(x), expected)


class Block(nn.Module):
    """Depthwise, norm, activation, pointwise, norm, activation, and a residual."""

    def __init__(self, channels=8, between=None, behind=None, **options):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **options)
        self.between = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()) if between is None else between
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.behind = nn.BatchNorm2d(channels) if behind is None else behind

    def forward(self, x):
        return x + self.behind(self.pointwise(self.between(self.depthwise(x))))


X = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(0))


def made(model, seed=0):
    """In eval mode, with other numbers in the norms."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    randomize_norms(model)
    return model.eval()


def check(model, x=X, *, fused=1, **options):
    """Optimizes, holds the result against the model's own, and returns both the copy and the reasons."""
    with torch.no_grad():
        expected = model(x.clone())
    optimized = fastsep.optimize(model, **options)
    report = fastsep.report(optimized)
    with torch.no_grad():
        got = optimized(x.clone())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert got.stride() == expected.stride()
    assert len(report.fused) == fused
    return optimized, [candidate.reason for candidate in report.left]


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 6), nn.LeakyReLU(), nn.SiLU(inplace=True), nn.Hardswish()),
    *(nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.GELU("tanh"), nn.Identity(), nn.Dropout(0.5)),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation, native_steps):
    """Between, behind, and behind a dense convolution."""
    dense = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), activation)
    model = made(nn.Sequential(Block(between=activation, behind=copy.deepcopy(activation)), dense))
    optimized, _ = check(model)
    graph = optimized.__dict__["forward"]._plans[0].graph
    functions = [node.name for node in graph.graph.nodes if node.op in ("call_function", "call_module")]
    assert len(functions) == 3  # the pair, the sum, and the dense convolution
    assert native_steps


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.Mish(), "no kernel for the activation Mish()"),
        (nn.LeakyReLU(0.2), "no kernel for the activation LeakyReLU(negative_slope=0.2)"),
        (nn.Hardtanh(), "no kernel for the activation Hardtanh(min_val=-1.0, max_val=1.0)"),
        (nn.GroupNorm(2, 8), "GroupNorm between"),
        (nn.BatchNorm2d(8, track_running_stats=False), "batch statistics between"),
        (nn.MaxPool2d(1), "followed by between (MaxPool2d), not by a pointwise convolution"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), "followed by between.1 (BatchNorm2d)"),
    ],
    ids=str,
)
def test_left_for_what_lies_between(between, reason):
    _, (got,) = check(made(Block(between=between)), fused=0)
    assert got.startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda b: setattr(b, "pointwise", nn.Conv2d(8, 8, 1, groups=2)),
            "pointwise behind it is a 1 x 1 conv",
        ),
        (
            lambda b: setattr(b, "pointwise", nn.Conv2d(8, 8, 3, padding=1)),
            "pointwise behind it is a 3 x 3 conv",
        ),
        (lambda b: setattr(b.depthwise, "padding_mode", "reflect"), "padding_mode of depthwise is 'reflect'"),
        (lambda b: b.depthwise.register_forward_hook(lambda m, x, y: y + 1), "a hook on depthwise"),
        (lambda b: b.between[0].register_forward_hook(lambda m, x, y: y + 1), "a hook on between.0"),
        (lambda b: b.between[1].register_forward_hook(lambda m, x, y: y + 1), "a hook on between.1"),
        (lambda b: b.pointwise.register_forward_pre_hook(lambda m, x: x[0] + 1), "a hook on pointwise"),
        (lambda b: nn.utils.parametrizations.spectral_norm(b.depthwise), "a parametrization on depthwise"),
        (lambda b: nn.utils.parametrizations.weight_norm(b.pointwise), "a parametrization on pointwise"),
        (lambda b: setattr(b.depthwise, "forward", lambda x: x * 2), "a forward of its own on depthwise"),
        (lambda b: setattr(b, "depthwise", Doubled(8, 8, 3, padding=1, groups=8)), "depthwise is a Doubled"),
    ],
)
def test_left_for_what_a_module_is(change, reason):
    model = Block()
    change(model)
    _, (got,) = check(made(model), fused=0)
    assert got.startswith(reason)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_result_in_between_that_others_read():
    class Twice(Block):
        def forward(self, x):
            t = self.between(self.depthwise(x))
            return self.pointwise(t) + t

    _, reasons = check(made(Twice()), fused=0)
    assert reasons == ["what lies behind depthwise is used 2 times"]


def test_written_as_functions():
    class Functions(Block):
        def forward(self, x):
            norm = self.between[0]
            t = F.conv2d(x, self.depthwise.weight, self.depthwise.bias, 1, padding=(1, 1), groups=8)
            t = F.batch_norm(t, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
            return torch.conv2d(F.relu6(t), self.pointwise.weight, self.pointwise.bias).relu_()

    check(made(Functions()))


def test_computed_weights_are_left():
    class Standardized(Block):
        def forward(self, x):
            weight = self.depthwise.weight - self.depthwise.weight.mean()
            return self.pointwise(F.conv2d(x, weight, groups=8))

    optimized = fastsep.optimize(made(Standardized()))
    assert not fastsep.report(optimized).fused


def test_writes_in_place_keep_their_order():
    """What is behind reads the input that an in-place activation has changed in the meantime."""

    class InPlace(Block):
        def forward(self, x):
            x = x * 1
            y = F.relu_(x)
            z = self.pointwise(self.between(self.depthwise(y)))
            x.add_(1)
            return z + x

    check(made(InPlace()))


def test_an_input_that_is_written_to_is_written_to():
    class InPlace(Block):
        def forward(self, x):
            return super().forward(F.relu_(x))

    optimized, _ = check(made(InPlace()))
    x = X.clone()
    optimized(x)
    assert torch.equal(x, X.relu())


def test_views_of_what_is_channels_last():
    class Head(Block):
        def forward(self, x):
            return super().forward(x).view(x.size(0), -1)

    check(made(Head()))


def test_asked_for_strides_keeps_the_layout():
    class Strides(Block):
        def forward(self, x):
            y = super().forward(x)
            return y.as_strided(y.shape, y.stride())

    optimized, _ = check(made(Strides()))
    assert not fastsep.report(optimized).channels_last


def test_default_arguments():
    """`if scale is not None` is decided by the default; with the argument the model's forward is called."""

    class Optional(Block):
        def forward(self, x, scale=None):
            y = super().forward(x)
            return y if scale is None else y * scale

    model = made(Optional())
    optimized, _ = check(model)
    with torch.no_grad():
        assert torch.equal(optimized(X, 2.0), model(X, 2.0))
        assert torch.equal(optimized(x=X), optimized(X))


class Untraceable(nn.Module):
    """Its own forward depends on the numbers; its children can be traced."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.alone = inner, nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        x = self.alone(x)
        return self.inner(x) if x.sum() > -1e9 else x


def test_by_structure_where_the_forward_cannot_be_traced(native_steps):
    model = made(Untraceable(nn.Sequential(Block(), Block())))
    optimized, (reason,) = check(model, fused=2)
    assert reason.startswith("the model could not be traced: symbolically traced variables")
    assert set(native_steps) == {"0_depthwise", "1_depthwise"}
    assert fastsep.revert(optimized).inner.__dict__.keys() == model.inner.__dict__.keys()


def test_inside_a_module_with_a_hook(native_steps):
    model = nn.Sequential(Block(), Block())
    seen = []
    model[1].register_forward_hook(lambda m, x, y: seen.append(y) or y + 1)
    check(made(model), fused=2)
    assert len(seen) == 2
    assert "depthwise" in native_steps


def test_a_forward_that_writes_to_its_module_is_left():
    class Remembers(Block):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    optimized, (reason,) = check(made(Remembers()), fused=0)
    assert reason == "the model could not be traced: it writes to the module"
    assert isinstance(optimized.last, torch.Tensor)


def test_filter():
    seen = []

    def second_only(module, name):
        seen.append((type(module), name))
        return name.startswith("1.")

    optimized, reasons = check(made(nn.Sequential(Block(), Block())), filter_fn=second_only)
    assert reasons == ["filter_fn"]
    assert seen == [(nn.Conv2d, "0.depthwise"), (nn.Conv2d, "1.depthwise")]
    optimized.load_state_dict(made(nn.Sequential(Block(), Block()), seed=1).state_dict())
    for _ in range(3):
        optimized(X)  # makes the plan anew, without the filter
    graph = optimized.__dict__["forward"]._plans[0].graph
    assert sum("Separable" in type(node.target).__name__ for node in graph.graph.nodes) == 1


def test_layers_of_the_library():
    layer = SeparableConv2d(8, 8, 3, stride=2, padding="same", mid_activation="relu6", depthwise_bias=True)
    model = nn.Sequential(layer, nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2))
    optimized, _ = check(made(model), torch.randn(1, 8, 10, 11))
    graph = optimized.__dict__["forward"]._plans[0].graph
    assert len([node for node in graph.graph.nodes if node.op == "call_function"]) == 1


@pytest.mark.parametrize("padding", [1, "same", ((0, 1), (2, 1))], ids=str)
def test_depthwise_layers_of_the_library(padding):
    """Their own activation is the one between; with one behind that, there are two."""
    layer = DepthwiseConv2d(8, 16, 3, 2, padding, activation="silu")
    model = nn.Sequential(layer, nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
    check(made(model), torch.randn(1, 8, 10, 11))
    _, (reason,) = check(made(nn.Sequential(layer, nn.ReLU(), *model[1:])), fused=0)
    assert reason == "followed by 1 (ReLU), not by a pointwise convolution"


def test_one_channel():
    """Depthwise or dense, it is the same."""
    model = nn.Sequential(DepthwiseConv2d(1, 1, 3, padding=((0, 1), (1, 0))), Block(8), nn.Conv2d(8, 1, 1))
    model[0] = nn.Sequential(model[0], nn.Conv2d(1, 8, 1))
    check(made(model), torch.randn(1, 1, 9, 9))


def test_float64():
    check(made(Block()).double(), X.double())


def test_shared_modules_and_weights():
    """They are only read, so each use is fused."""
    block = Block()
    other = Block()
    other.pointwise.weight = block.pointwise.weight
    optimized, _ = check(made(nn.Sequential(block, other, block)), fused=3)
    assert optimized[1].pointwise.weight is optimized[0].pointwise.weight


# What may come after optimize().


@pytest.fixture
def pair():
    """A model and its optimized copy."""
    model = made(Block())
    return model, fastsep.optimize(model)


def settled(model, x=X):
    """The result once the model has seen its new state often enough to work with it."""
    with torch.no_grad():
        results = [model(x) for _ in range(3)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)
    return results[-1]


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
    for one in (model, optimized):
        one.train()(X)
        one.eval()
    assert not native_steps
    torch.testing.assert_close(settled(optimized), model(X).detach(), rtol=1e-4, atol=1e-5)
    assert native_steps


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
    assert len(lines) == 13, result.stderr
    assert parse_case(lines[0]).mid == "relu"


def test_python_does_little():
    """One call of a Python function for each of the 14 steps, and a few around them."""
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
    assert 14 < len(ours) < 14 + 15, ours
    assert len(calls) < 14 * 5


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
    assert len(native_steps) == 2
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
