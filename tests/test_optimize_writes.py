"""fastsep.optimize: models that write to what they or others read keep doing so in their order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optimizing import Block, X, check, made
from torch import nn

import fastsep
from fastsep import _native

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")


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


def doubled(y):
    z = y.reshape(y.size(0), -1)
    z.mul_(2)
    return y + z.sum()


def doubled_before(y):
    z = y.view(-1)
    y.mul_(2)
    return z


ALIASES = {
    "flatten": lambda y: (y.flatten(1).relu_(), y)[1],
    "function": lambda y: (torch.flatten(y, 1).add_(1), y)[1],
    "contiguous": lambda y: (y.contiguous().mul_(2), y)[1],
    "reshape": doubled,
    "written_before": doubled_before,
    "part": lambda y: (y.view(y.size(0), -1)[:, 3:].mul_(2), y)[1],
    "out": lambda y: (torch.neg(y.ravel(), out=y.ravel()), y)[1],
}


@pytest.mark.parametrize("name", ALIASES)
def test_writes_by_way_of_a_view(name):
    """In channels-last these were copies, and the write lost."""

    class Writes(Block):
        def forward(self, x):
            return ALIASES[name](super().forward(x))

    optimized, _ = check(made(Writes()))
    assert not fastsep.report(optimized).channels_last


def test_writes_by_way_of_a_module():
    class Writes(Block):
        def __init__(self):
            super().__init__()
            self.flatten = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))

        def forward(self, x):
            y = super().forward(x)
            return y + self.flatten(y).sum()

    check(made(Writes()))


@pytest.mark.parametrize(
    "write",
    [lambda x: x[:, 1:].add_(1), lambda x: x.view(-1).add_(1), lambda x: torch.mul(x, 2, out=x.detach())],
)
def test_an_input_that_is_written_to_by_way_of_a_view(write):
    class Writes(Block):
        def forward(self, x):
            write(x)
            return super().forward(x)

    model = made(Writes())
    optimized = fastsep.optimize(model)
    ours, theirs = X.clone(), X.clone()
    with torch.no_grad():
        torch.testing.assert_close(optimized(ours), model(theirs), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, X)


@pytest.mark.parametrize(
    "head",
    [
        lambda y: (y + 1).relu_().flatten(1),
        lambda y: y.flatten(1) + y.mean((1, 2, 3), keepdim=True).mul_(2).flatten(1),
        lambda y: torch.cat([y, y], 1).add_(1) + y.contiguous().view(-1).sum(),
    ],
)
def test_writes_that_no_copy_misses(head):
    class Writes(Block):
        def forward(self, x):
            return head(super().forward(x))

    optimized, _ = check(made(Writes()))
    assert fastsep.report(optimized).channels_last
