"""Weights that change count, however they were written, in a frozen layer and in an optimized model."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from optimizing import Block, X, made
from torch import nn

import fastsep
from fastsep import SeparableConv2d, _native

needs_native = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


def frozen_layer():
    torch.manual_seed(0)
    return SeparableConv2d(8, 8, 3, padding=1).eval().freeze()


def optimized_block():
    return fastsep.optimize(made(Block()))


def plain(model):
    """A copy that computes by torch's own convolutions."""
    copied = copy.deepcopy(model)
    if not isinstance(copied, SeparableConv2d):
        return fastsep.revert(copied)
    return lambda x: copied.pointwise(copied.depthwise(x))


def check(model, x=X, calls=4):
    own = plain(model)
    with torch.no_grad():
        for _ in range(calls):
            torch.testing.assert_close(model(x), own(x), rtol=1e-4, atol=1e-5)


def step(optimizer, **options):
    def change(model):
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer(parameters, lr=0.1, **options).step()

    return change


def swap(model):
    torch.utils.swap_tensors(model.pointwise.weight, nn.Parameter(torch.randn(8, 8, 1, 1)))


def other_parameter(model):
    model.pointwise.weight = nn.Parameter(torch.randn(8, 8, 1, 1))


def change_last_number(model):
    model.depthwise.weight.data[-1, 0, -1, -1] = 3


def transpose(model):
    model.pointwise.weight.data = model.pointwise.weight.data.transpose(0, 1)


def average(model):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(made(copy.deepcopy(model)))
    model.load_state_dict(averaged.module.state_dict())


def vector(model):
    count = sum(parameter.numel() for parameter in model.parameters())
    nn.utils.vector_to_parameters(torch.randn(count), model.parameters())


CHANGES = {
    **{f"fused {kind.__name__}": step(kind, fused=True) for kind in (
        torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad,
    )},
    "SGD": step(torch.optim.SGD),
    "foreach": step(torch.optim.SGD, foreach=True),
    "in place": lambda model: model.pointwise.weight.detach().mul_(2),
    "data": lambda model: model.pointwise.weight.data.mul_(2),
    "bias": lambda model: model.pointwise.bias.data.add_(1),
    "numpy": lambda model: model.depthwise.weight.detach().numpy().fill(0.5),
    "last number": change_last_number,
    "other memory": lambda model: setattr(model.pointwise.weight, "data", torch.randn(8, 8, 1, 1)),
    "other strides": transpose,
    "child": lambda model: model.pointwise.load_state_dict(nn.Conv2d(8, 8, 1).state_dict()),
    "vector": vector,
    "swap": swap,
    "average": average,
    "other parameter": other_parameter,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [frozen_layer, optimized_block])
def test_a_change_counts(make, change):
    model = make()
    check(model)
    CHANGES[change](model)
    check(model)
    CHANGES[change](model)
    check(model)


@needs_native
@pytest.mark.parametrize("make", [frozen_layer, optimized_block])
def test_new_weights_are_packed_again(make, monkeypatch):
    model = make()
    check(model)
    model.pointwise.weight.data.mul_(2)
    packed = []
    pack = _native.pack
    monkeypatch.setattr(_native, "pack", lambda *args: packed.append(1) or pack(*args))
    counts = []
    with torch.no_grad():
        for _ in range(6):
            model(X)
            counts.append(len(packed))
    assert 0 < counts[2] == counts[5]


def test_children_in_another_dtype():
    layer = frozen_layer()
    with torch.no_grad():
        layer(X)
    for child in layer.children():
        child.double()
    check(layer, X.double())


def test_training_of_a_frozen_layer():
    layer = frozen_layer()
    layer(X)
    layer.requires_grad_(True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(X).sum().backward()
        optimizer.step()
        torch.testing.assert_close(layer(X), plain(layer)(X), rtol=1e-4, atol=1e-5)


class Normed(nn.Module):
    """Norms whose statistics nobody counts."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x):
        x = F.batch_norm(self.depthwise(x), self.mean, self.variance, training=self.training)
        return self.pointwise(x)


def test_statistics_without_a_count():
    model = fastsep.optimize(Normed().eval())
    check(model)
    with pytest.warns(UserWarning, match="revert"):
        model.train()
    with torch.no_grad():
        model(X + 3)
    model.eval()
    assert model.mean.abs().max() > 0.1
    check(model)


class Numbers(Normed):
    """A forward that reads buffers, and a tensor that is no buffer, as numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("flag", torch.tensor(True))
        self.plain = torch.tensor([1.0, 2.0])

    def forward(self, x):
        y = super().forward(x) * self.scale.item()
        return y + self.plain.tolist()[1] if self.flag else y


def test_numbers_that_a_forward_reads():
    model = fastsep.optimize(Numbers().eval())
    check(model)
    model.scale.fill_(3)
    check(model)
    model.flag.fill_(False)
    check(model)
    model.flag.data.fill_(True)
    check(model)
    model.plain.mul_(2)
    check(model)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(0.5),
        lambda weight: weight.data.mul_(0.5),
        lambda weight: weight.detach()[0].zero_(),
    ],
)  # fmt: skip
def test_a_forward_that_writes_its_weights(write):
    class Writes(Normed):
        def forward(self, x):
            with torch.no_grad():
                write(self.pointwise.weight)
            return super().forward(x)

    own = Writes().eval()
    with pytest.warns(UserWarning, match=r"it writes to pointwise\.weight"):
        optimized = fastsep.optimize(own)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(optimized(X), own(X), rtol=1e-4, atol=1e-5)


@needs_native
def test_hooks_in_a_new_dictionary():
    model, seen = optimized_block(), []
    check(model)
    model.pointwise._forward_hooks = OrderedDict()
    model.pointwise.register_forward_hook(lambda *_args: seen.append(1))
    with torch.no_grad():
        model(X)
    assert seen == [1]


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        lambda child: setattr(child, "forward", lambda x: x * 2),
        lambda child: setattr(child, "stride", (2, 2)),
        lambda child: setattr(child, "padding", (1, 1)),
    ],
)
def test_attributes_of_a_child(change):
    class Pair(Normed):
        def forward(self, x):
            return self.pointwise(self.depthwise(x))

    model = fastsep.optimize(Pair().eval())
    check(model)
    change(model.pointwise)
    check(model)
