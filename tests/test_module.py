"""The layer: what nn.Module and two nn.Conv2d promise."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from handwritten import HandWritten, X, layer, same
from torch import nn

import fastsep
from fastsep import SeparableConv2d, functional

ALIKE = {
    "plain": ({}, {}),
    "padding": ({"padding": 1}, {"padding": 1}),
    "paddings": ({"padding": (2, 0)}, {"padding": (2, 0)}),
    "paddings_in_full": ({"padding": ((2, 2), (1, 1))}, {"padding": (2, 1)}),
    "valid": ({"padding": "valid", "stride": 2}, {"padding": "valid", "stride": 2}),
    "same": ({"padding": "same"}, {"padding": "same"}),
    "same_dilated": ({"padding": "same", "dilation": (2, 3)}, {"padding": "same", "dilation": (2, 3)}),
    "same_even_kernel": ({"padding": "same", "kernel_size": (4, 2)}, {"padding": "same", "k": (4, 2)}),
    "same_strided": ({"padding": "same", "stride": 2}, {"pads": (0, 1, 1, 1), "stride": 2}),
    "four_paddings": ({"padding": ((1, 0), (3, 2))}, {"pads": (3, 2, 1, 0)}),
    "strides": ({"stride": (1, 3)}, {"stride": (1, 3)}),
    "reflect": ({"padding": 2, "padding_mode": "reflect"}, {"padding": 2, "padding_mode": "reflect"}),
    "replicate": (
        {"padding": (1, 3), "padding_mode": "replicate"},
        {"padding": (1, 3), "padding_mode": "replicate"},
    ),
    "circular_same": (
        {"padding": "same", "kernel_size": 4, "padding_mode": "circular"},
        {"padding": "same", "k": 4, "padding_mode": "circular"},
    ),
    "reflect_four_paddings": (
        {"padding": ((1, 0), (3, 2)), "padding_mode": "reflect"},
        {"pads": (3, 2, 1, 0), "mode": "reflect"},
    ),
    "multiplier": ({"depth_multiplier": 3}, {"m": 3}),
    "no_bias": ({"bias": False}, {"b": False}),
    "both_biases": ({"depthwise_bias": True}, {"db": True}),
    "activations": (
        {"depthwise_bias": True, "mid_activation": "relu6", "activation": "gelu_tanh"},
        {"db": True, "mid": "relu6", "act": "gelu_tanh"},
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_is_two_convolutions(name, grad):
    """From the same seed: weights, keys of the state dict, and results."""
    options, by_hand = ALIKE[name]
    kernel = options.get("kernel_size", 3)
    ours = layer(6, 5, kernel, **{key: value for key, value in options.items() if key != "kernel_size"})
    torch.manual_seed(0)
    theirs = HandWritten(**by_hand)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    with torch.set_grad_enabled(grad):
        for x in (X, X.contiguous(memory_format=torch.channels_last), X[0], X[:0]):
            same(ours(x), theirs(x))
            same(ours._call_children(x), theirs(x))
        assert ours(X).requires_grad == grad


def test_plain_layer_takes_the_native_path(native_calls):
    with torch.no_grad():
        layer()(X)
    assert len(native_calls) == 1


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "before", "after"),
    # size, kernel, stride and dilation of networks ported from TensorFlow, and what it pads there
    [
        (224, 3, 2, 1, 0, 1),
        (225, 3, 2, 1, 1, 1),
        (7, 3, 1, 1, 1, 1),
        (8, 2, 1, 1, 0, 1),
        (8, 5, 2, 1, 1, 2),
        (9, 5, 2, 1, 2, 2),
        (8, 3, 3, 1, 0, 1),
        (9, 1, 2, 1, 0, 0),
        (10, 2, 4, 1, 0, 0),
        (15, 3, 1, 6, 6, 6),
        (14, 3, 2, 2, 1, 2),
        (1, 7, 2, 1, 3, 3),
    ],
)
def test_same_is_that_of_tensorflow(size, kernel, stride, dilation, before, after):
    weight = torch.empty(1, 1, kernel, 1)
    pads = functional.same_padding(torch.empty(1, size, 1), weight.shape[2:], (stride, 1), (dilation, 1))
    assert pads == (before, after, 0, 0)
    with torch.no_grad():
        y = layer(1, 1, (kernel, 1), (stride, 1), "same", (dilation, 1))(torch.zeros(1, size, 3))
    assert y.shape == (1, -(-size // stride), 3)


def test_state_dict_both_ways():
    options = {"depth_multiplier": 2, "depthwise_bias": True}
    ours, theirs = layer(6, 5, 3, **options), HandWritten(m=2, db=True)
    theirs.load_state_dict(ours.state_dict())
    same(ours(X), theirs(X))
    ours.load_state_dict(HandWritten(m=2, db=True).state_dict())
    theirs.load_state_dict(ours.state_dict(), assign=True)
    same(ours(X), theirs(X))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"pointwise.bias\""):
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "pointwise.bias"})


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, frozen):
    original = layer(6, 5, 3, stride=2, padding="same", mid_activation="silu", activation="relu")
    if frozen:
        original.freeze()
    if how == "deepcopy":
        copied = copy.deepcopy(original)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(original))
    else:
        file = io.BytesIO()
        torch.save(original, file)
        copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert repr(copied) == repr(original)
    assert copied.frozen == frozen
    assert torch.equal(copied(X), original(X))
    copied.unfreeze()
    with torch.no_grad():
        copied.pointwise.weight.zero_()
        copied.pointwise.bias.zero_()
    assert not copied(X).any()
    assert original(X).any()
    assert all(p.requires_grad != frozen for p in original.parameters())


def test_packed_weights_are_in_no_file():
    """They belong to one processor, and are made again."""
    thawed, frozen = layer(64, 64, 3), layer(64, 64, 3).freeze()
    assert frozen._packed is not None
    assert len(pickle.dumps(frozen)) < len(pickle.dumps(thawed)) + 500
    assert list(frozen.state_dict()) == list(thawed.state_dict())


def test_meta_device():
    with torch.device("meta"):
        empty = SeparableConv2d(6, 5, 3, padding="same", stride=2)
    assert empty.depthwise.weight.is_meta
    assert empty(X.to("meta")).shape == (2, 5, 6, 5)
    filled = layer(6, 5, 3, padding="same", stride=2)
    for target in (empty, SeparableConv2d(6, 5, 3, padding="same", stride=2, device="meta").freeze()):
        target.to_empty(device="cpu").load_state_dict(filled.state_dict())
        assert torch.equal(target(X), filled(X))


def test_default_device_and_dtype():
    """A device as a context is a torch function mode, which sees the operator as it sees others."""
    with torch.device("cpu"):
        y = layer()(X)
    assert torch.equal(y, layer()(X))
    assert layer(6, 5, 3, dtype=torch.float64)(X.double()).dtype == torch.float64
    assert layer().double().half()(X.half()).dtype == torch.float16


def test_reset_parameters():
    first = layer(seed=3)
    second = layer(seed=4)
    torch.manual_seed(3)
    second.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_repr_says_what_the_children_do_not():
    text = repr(layer(6, 5, 3, stride=2, padding="same", mid_activation="relu6", activation="silu").freeze())
    assert "SeparableConv2d(\n  padding='same', mid_activation='relu6', activation='silu', frozen\n" in text
    assert "(depthwise): Conv2d(6, 6, kernel_size=(3, 3), stride=(2, 2), groups=6, bias=False)" in text
    assert repr(layer()).startswith("SeparableConv2d(\n  (depthwise)")
    assert (layer().in_channels, layer().out_channels) == (6, 5)


CONSTRUCTORS = [
    ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
    ({"in_channels": "6"}, TypeError, "in_channels must be an int, got '6'"),
    ({"out_channels": -1}, ValueError, "out_channels must be at least 1"),
    ({"depth_multiplier": 0}, ValueError, "depth_multiplier must be at least 1"),
    ({"depth_multiplier": 1.5}, TypeError, "depth_multiplier must be an int"),
    ({"kernel_size": 0}, ValueError, r"kernel_size must be at least 1, got \(0, 0\)"),
    ({"kernel_size": (3, 3, 3)}, TypeError, "kernel_size must be an int or a pair of ints"),
    ({"stride": (1, 0)}, ValueError, r"stride must be at least 1, got \(1, 0\)"),
    ({"stride": None}, TypeError, "stride must be an int or a pair of ints, got None"),
    ({"dilation": -1}, ValueError, "dilation must be at least 1"),
    ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    ({"padding": ((0, 0), (0, -2))}, ValueError, "padding must be at least 0"),
    ({"padding": "full"}, ValueError, 'padding must be "valid" or "same".*full'),
    ({"padding": (1, 2, 3)}, TypeError, "padding must be an int"),
    ({"padding": 1.0}, TypeError, "padding must be an int"),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode"),
    ({"mid_activation": "swish"}, ValueError, "mid_activation must be None or one of relu"),
    ({"activation": nn.ReLU()}, ValueError, "activation must be None or one of relu"),
]


@pytest.mark.parametrize(("change", "error", "message"), CONSTRUCTORS)
def test_constructor_refuses(change, error, message):
    with pytest.raises(error, match=message):
        SeparableConv2d(**{"in_channels": 6, "out_channels": 5, "kernel_size": 3} | change)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X[:, :5], RuntimeError, r"input must have 6 channels, got \[2, 5, 11, 10\]"),
        (X[:, :3], RuntimeError, r"input must have 6 channels, got \[2, 3, 11, 10\]"),  # 6 is a multiple of 3
        (X[0, 0], RuntimeError, r"input must be \[N, C, H, W\] or \[C, H, W\]"),
        (X[..., :2], RuntimeError, "must be at least as large as the dilated kernel"),
        (X.double(), RuntimeError, "input must have the weights' dtype"),
        (X.to("meta"), RuntimeError, "input must be on the weights' device"),
        (X.long(), RuntimeError, "must be floating point or complex"),
        (X.tolist(), TypeError, "input must be a Tensor, got list"),
    ],
)
def test_call_refuses(x, error, message, frozen):
    good = layer().freeze() if frozen else layer()
    expected = good(X)
    with pytest.raises(error, match=message):
        good(x)
    assert torch.equal(good(X), expected)


def test_activation_may_change_later():
    changed = layer()
    changed.activation = "relu"
    assert changed(X).min() == 0
    changed.mid_activation = "nonsense"
    with pytest.raises(ValueError, match="mid_activation must be"):
        changed(X)


def test_symbolic_trace_shows_the_children():
    traced = torch.fx.symbolic_trace(
        nn.Sequential(layer(6, 5, 3, padding=((1, 0), (0, 1)), activation="relu"), nn.ReLU())
    )
    assert {"0.depthwise", "0.pointwise"} <= {node.target for node in traced.graph.nodes}
    same(traced(X), layer(6, 5, 3, padding=((1, 0), (0, 1)), activation="relu")(X))


def test_training_step_is_that_of_two_convolutions():
    ours, theirs = layer(6, 5, 3, mid_activation="relu"), HandWritten(mid="relu")
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            module(X).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        same(a, b)


def test_public_names():
    layers, functions = ["DepthwiseConv2d", "SeparableConv2d"], ["depthwise_conv2d", "separable_conv2d"]
    networks = [
        "Cost",
        "Machine",
        "Report",
        "cost",
        "decompositions",
        "load_from",
        "models",
        "optimize",
        "report",
    ]
    names = [*layers, *functions, *networks, "revert", "__version__", "reference"]
    assert sorted(fastsep.__all__) == sorted(names)
    assert all(hasattr(fastsep, name) for name in fastsep.__all__)
