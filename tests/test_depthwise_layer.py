"""DepthwiseConv2d, the layer: an nn.Conv2d in all that is done to one."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from handwritten import X, depthwise, layer, same
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastsep
from fastsep import DepthwiseConv2d, SeparableConv2d, _native
from fastsep._activations import ACTIVATIONS

# torch's own, inside its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")

ALIKE = {
    "plain": ({}, {}),
    "multiplier": ({"out_channels": 18}, {"out_channels": 18}),
    "padding": ({"padding": (2, 0)}, {"padding": (2, 0)}),
    "valid": ({"padding": "valid", "stride": 2}, {"padding": "valid", "stride": 2}),
    "same": ({"padding": "same", "dilation": (2, 3)}, {"padding": "same", "dilation": (2, 3)}),
    "strides": ({"stride": (1, 3), "bias": False}, {"stride": (1, 3), "bias": False}),
    "groups": ({"groups": 6}, {}),
    "reflect": ({"padding": 2, "padding_mode": "reflect"}, {"padding": 2, "padding_mode": "reflect"}),
    "circular": (
        {"padding": "same", "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "circular"},
    ),
    "double": ({"dtype": torch.float64}, {"dtype": torch.float64}),
}


def conv(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Conv2d(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6} | options)


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_is_a_convolution(name, activation):
    """From the same seed: weights, keys, attributes, what is printed, results and gradients."""
    ours, theirs = depthwise(**ALIKE[name][0], activation=activation), conv(**ALIKE[name][1])
    act = ACTIVATIONS[activation or "identity"].forward
    assert isinstance(ours, nn.Conv2d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for attribute in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    shown = repr(theirs) if activation is None else f"{repr(theirs)[:-1]}, activation={activation!r})"
    assert repr(ours) == f"Depthwise{shown}"
    for x in (X, X.contiguous(memory_format=torch.channels_last), X[0], X[:0]):
        x = x.to(theirs.weight.dtype)
        same(ours(x), act(theirs(x)))
        grads = [
            torch.autograd.grad(y.square().sum(), list(module.parameters()))
            for module, y in ((ours, ours(x)), (theirs, act(theirs(x))))
        ]
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_positional_arguments_are_those_of_nn_conv2d():
    args = (6, 12, (3, 2), 2, 1, (1, 2), 6, False, "zeros", "cpu", torch.float64)
    ours, theirs = DepthwiseConv2d(*args), nn.Conv2d(*args)
    assert repr(ours) == f"Depthwise{theirs!r}"
    assert ours.weight.dtype == torch.float64
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(
        ours(X.double()), fastsep.depthwise_conv2d(X.double(), theirs.weight, None, 2, 1, (1, 2))
    )


@pytest.mark.parametrize(
    ("padding", "stride", "pads"),
    [(((1, 0), (3, 2)), 1, (3, 2, 1, 0)), ("same", 2, (0, 1, 1, 1)), ("same", (2, 1), (1, 1, 1, 1))],
)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_padding_that_nn_conv2d_has_not(padding, stride, pads, mode):
    ours, theirs = depthwise(padding=padding, stride=stride, padding_mode=mode), conv(stride=stride)
    padded = F.pad(X, pads, "constant" if mode == "zeros" else mode)
    same(ours(X), theirs(padded))
    assert ours.padding == padding
    assert re.search(rf"padding={re.escape(str(padding))}\b|padding=\(\(1, 0\), \(3, 2\)\)", repr(ours))


CONSTRUCTORS = [
    ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
    ({"out_channels": 6.0}, TypeError, "out_channels must be an int, got 6.0"),
    ({"out_channels": 9}, ValueError, "out_channels must be a multiple of in_channels, 6, got 9"),
    ({"out_channels": 3}, ValueError, "out_channels must be a multiple of in_channels, 6, got 3"),
    ({"groups": 1}, ValueError, "groups must be None or in_channels, 6, got 1"),
    ({"groups": 3}, ValueError, "groups must be None or in_channels, 6, got 3"),
    ({"kernel_size": 0}, ValueError, r"kernel_size must be at least 1, got \(0, 0\)"),
    ({"stride": None}, TypeError, "stride must be an int or a pair of ints, got None"),
    ({"dilation": -1}, ValueError, "dilation must be at least 1"),
    ({"padding": ((0, 0), (0, -2))}, ValueError, "padding must be at least 0"),
    ({"padding": "full"}, ValueError, 'padding must be "valid" or "same".*full'),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode"),
    ({"activation": "swish"}, ValueError, "activation must be None or one of relu"),
]


@pytest.mark.parametrize(("change", "error", "message"), CONSTRUCTORS)
def test_constructor_refuses(change, error, message):
    with pytest.raises(error, match=message):
        depthwise(**change)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X[:, :3], RuntimeError, r"input must have 6 channels, got \[2, 3, 11, 10\]"),
        (X[0, 0], RuntimeError, r"input must be \[N, C, H, W\] or \[C, H, W\]"),
        (X.double(), RuntimeError, "input must have the weights' dtype"),
        (X.tolist(), TypeError, "input must be a Tensor, got list"),
    ],
)
def test_call_refuses(x, error, message):
    with pytest.raises(error, match=message):
        depthwise()(x)


def test_attributes_may_change_later():
    changed, theirs = depthwise(padding="same", stride=2), conv(stride=2)
    changed.stride = theirs.stride = 1
    changed.padding = theirs.padding = (2, 1)
    same(changed(X), theirs(X))
    changed.activation = "relu"
    assert changed(X).min() == 0
    changed.activation = "nonsense"
    with pytest.raises(ValueError, match="activation must be"):
        changed(X)


class Times(nn.Module):
    def forward(self, x):
        return 5 * x


CHANGES = {
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Times()),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.eval()),
    "weight_norm": lambda m: parametrizations.weight_norm(m),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned_for_good": lambda m: prune.remove(prune.l1_unstructured(m, "weight", 0.5), "weight"),
    "forward_hook": lambda m: m.register_forward_hook(lambda _m, _x, y: y + 1),
    "pre_hook": lambda m: m.register_forward_pre_hook(lambda _m, x: (x[0] * 2,)),
    "no_bias": lambda m: setattr(m, "bias", None),
    "data": lambda m: m.weight.data.mul_(3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_done_to_convolutions_works(name):
    results = []
    for module in (depthwise(padding=1), conv(padding=1)):
        torch.manual_seed(5)
        CHANGES[name](module)
        x = X.clone().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_backward_hooks_run():
    module, calls = depthwise(activation="silu"), []
    module.register_full_backward_hook(lambda *args: calls.append(args[0]))
    module(X.clone().requires_grad_()).sum().backward()
    assert calls == [module]


def test_copies_and_files():
    module = depthwise(padding="same", stride=2, activation="gelu")
    expected = module(X)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(X), expected)
        assert repr(twin) == repr(module)


def test_takes_the_native_path(native_calls, native_backward_calls):
    module = depthwise(activation="relu")
    with torch.no_grad():
        module(X)
    assert len(native_calls) == 1
    y = module(X)
    assert y.grad_fn.name() == "DepthwiseConv2dFunctionBackward"
    y.sum().backward()
    assert (len(native_calls), len(native_backward_calls)) == (2, 1)


# As a child of the separable layer


def test_separable_layer_fuses_it(native_calls):
    ours, theirs = layer(6, 5, 3, mid_activation="relu"), layer(6, 5, 3, mid_activation="relu")
    for padding, stride in ((0, 1), (1, 2), (((1, 0), (3, 2)), 1), ("same", 2)):
        theirs = layer(6, 5, 3, stride, padding, mid_activation="relu")
        ours.depthwise = depthwise(padding=padding, stride=stride, bias=False)
        ours.depthwise.load_state_dict(theirs.depthwise.state_dict())
        native_calls.clear()
        with torch.no_grad():
            assert torch.equal(ours(X), theirs(X))
        assert len(native_calls) == 2


@pytest.mark.parametrize("what", ["activation", "hook", "own_padding"])
def test_separable_layer_calls_it(what, native_calls):
    """With something of its own it is a call of its own."""
    ours = layer(6, 5, 3, padding=((1, 0), (0, 1)) if what == "own_padding" else 0)
    options = {"activation": {"activation": "silu"}, "own_padding": {"padding": 1}}.get(what, {})
    ours.depthwise = depthwise(**options)
    if what == "hook":
        ours.depthwise.register_forward_hook(lambda _m, _x, y: 2 * y)
    x = F.pad(X, (0, 1, 1, 0)) if what == "own_padding" else X
    with torch.no_grad():
        expected = ours.pointwise(ours.depthwise(x))
        native_calls.clear()
        assert torch.equal(ours(X), expected)
    assert len(native_calls) == 1


def test_parametrized_child_is_fused(native_calls):
    ours = SeparableConv2d(6, 5, 3)
    ours.depthwise = depthwise(bias=False)
    parametrize.register_parametrization(ours.depthwise, "weight", Times())
    with torch.no_grad():
        got = ours(X)
        assert len(native_calls) == 1
        same(got, ours.pointwise(ours.depthwise(X)))
