"""fastsep.optimize: what it finds, that the result is the same, and that nothing else changes."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import network
from optimizing import Block, X, check, made, nodes_of, settled, steps_of
from torch import nn

import fastsep
from fastsep import DepthwiseConv2d, SeparableConv2d, _native

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")

GATED = "squeeze-and-excite between"


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
    assert not got.requires_grad
    limit = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=limit)
    # Both halves of what is left are kernels of their own.
    assert len(native_steps) >= fused + 2 * (count - fused)
    assert 0 < report.error < 1e-5
    assert all(0 < candidate.error < 1e-5 for candidate in report.fused)
    assert report.channels_last
    # The keys and the numbers of the original, and its forward back.
    optimized.load_state_dict(model.state_dict())
    assert list(optimized.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fastsep.revert(optimized)(x), expected)


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
    assert len(nodes_of(optimized)) == 2  # the pair with the sum, and the dense convolution
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


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout2d, F.alpha_dropout])
def test_functions_that_drop_nothing(dropout):
    class Drops(Block):
        def __init__(self, always):
            super().__init__()
            self.always = always

        def forward(self, x):
            y = self.pointwise(dropout(self.depthwise(x), training=self.always or self.training))
            y += x
            return y

    optimized, _ = check(made(Drops(always=False)), fused=1)
    assert fastsep.report(optimized).channels_last
    assert not fastsep.report(fastsep.optimize(made(Drops(always=True)))).fused


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
    assert sum("Separable" in type(step).__name__ for step in steps_of(optimized)) == 1


def test_what_the_filter_leaves_is_left(native_steps):
    """By the kernel for a lone depthwise convolution, too."""
    model = made(nn.Sequential(Block(), nn.Conv2d(8, 8, 1)))
    optimized, _ = check(model, fused=0, filter_fn=lambda module, name: False)
    for _ in range(2):
        assert {"0_pointwise", "1"} == set(native_steps)
        optimized.load_state_dict(made(model, seed=1).state_dict())
        native_steps.clear()
        settled(optimized)


def asks_is_tensor(block, x):
    return Block.forward(block, x) * (2 if torch.is_tensor(x) else 3)


def asks_isinstance(block, x):
    return Block.forward(block, x) * (2 if isinstance(x, torch.Tensor) else 3)


def asks_for_an_attribute(block, x):
    return Block.forward(block, x) * (2 if hasattr(x, "scale") else 3)


def asks_for_the_shapes_type(block, x):
    return Block.forward(block, x) * (2 if isinstance(x.shape, tuple) else 3)


def sets_data(block, x):
    y = Block.forward(block, x)
    y.data += 1
    return y


def computes_in_half_precision(block, x):
    with torch.autocast("cpu", torch.bfloat16):
        return Block.forward(block, x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (asks_is_tensor, "it asks for the type of what it computes with"),
        (asks_isinstance, "it asks for the type of what it computes with"),
        (asks_for_the_shapes_type, "it asks for the type of what it computes with"),
        (asks_for_an_attribute, "it asks for scale, which a tensor does not have"),
        (sets_data, "it sets data of a tensor"),
        (computes_in_half_precision, "it uses autocast"),
    ],
)
def test_what_a_trace_would_answer_wrongly(forward, reason):
    class Asks(Block):
        def forward(self, x):
            return forward(self, x)

    _, (got,) = check(made(Asks()), fused=0)
    assert got == f"the model could not be traced: {reason}"


@pytest.mark.parametrize(
    "draw", [random.random, lambda: torch.rand(1).item(), lambda: float(np.random.rand())]
)
def test_random_numbers_are_drawn_in_each_call(draw):
    class Draws(Block):
        def forward(self, x):
            return super().forward(x) * draw()

    model = Draws().eval()
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[2]
    optimized = fastsep.optimize(model)
    (candidate,) = fastsep.report(optimized).left
    assert candidate.reason == "the model could not be traced: it draws random numbers"
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[2] == before[2]
    assert not torch.equal(optimized(X), optimized(X))


def test_arguments_that_are_no_tensors(native_steps):
    """`if scale is not None` is true of a stand-in; the model is asked what to do without."""

    class Scaled(Block):
        def forward(self, x, scale):
            y = super().forward(x)
            return y * scale if scale is not None else y

    model = made(Scaled())
    optimized = fastsep.optimize(model)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X, 2.0), model(X, 2.0), rtol=1e-4, atol=1e-5)
        assert native_steps
        assert torch.equal(optimized(X, None), model(X, None))


def test_layers_of_the_library():
    layer = SeparableConv2d(8, 8, 3, stride=2, padding="same", mid_activation="relu6", depthwise_bias=True)
    model = nn.Sequential(layer, nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2))
    optimized, _ = check(made(model), torch.randn(1, 8, 10, 11))
    assert sum(node.op == "call_function" for node in nodes_of(optimized)) == 1


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
