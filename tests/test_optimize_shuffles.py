"""fastsep.optimize: the channel shuffle behind ShuffleNet's units."""

from __future__ import annotations

import pytest
import torch
from optimizing import check, made, steps_of, targets_of
from test_optimize_series import pair
from torch import nn

import fastsep
from fastsep import _native
from fastsep._optimize.shuffles import ShuffleStep

pytestmark = pytest.mark.skipif(_native.core is None, reason="the native module is missing")

X = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))


def by_size(x):
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def by_shape(x):
    n, c, h, w = x.shape
    return torch.transpose(x.reshape(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, c, h, w)


def by_single_sizes(x):
    y = x.view(x.size(0), 2, x.size(1) // 2, x.size(2), x.size(3)).transpose(1, 2).contiguous()
    return y.view(x.size(0), x.size(1), x.size(2), x.size(3))


def in_three_groups(x):
    n, c, h, w = x.size()
    return x.view(n, 4, c // 4, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def in_other_places(x):
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(3, 4).contiguous().view(n, c, h, w)


def in_another_order(x):
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, w, h).transpose(1, 2).contiguous().view(n, c, h, w)


def read_in_between(x):
    n, c, h, w = x.size()
    y = x.view(n, 2, c // 2, h, w).transpose(1, 2)
    return y.contiguous().view(n, c, h, w) + y.mean((1, 2), True)[:, 0]


class Unit(nn.Module):
    """A unit that shuffles two branches, and one that takes its halves."""

    def __init__(self, shuffle=by_size, split=lambda x: x.chunk(2, dim=1), channels=8, merge=None):
        super().__init__()
        self.branches = nn.ModuleList([pair(), pair()])
        self.branches[1][2] = nn.Conv2d(8, channels, 1)
        self.third = nn.Sequential(nn.Conv2d((8 + channels) // 2, 8, 1), nn.ReLU())
        self.shuffle, self.split, self.channels = shuffle, split, channels
        self.merge = merge or (lambda a, b: torch.cat((a, b), dim=1))

    def forward(self, x):
        shuffled = self.shuffle(self.merge(*(branch(x) for branch in self.branches)))
        a, b = self.split(shuffled)
        return torch.sin(self.shuffle(self.merge(a, self.third(b))))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 3),
        ({"shuffle": by_shape}, 3),
        ({"shuffle": by_single_sizes}, 3),
        ({"merge": lambda a, b: torch.cat([b, a], 1)}, 3),
        ({"split": lambda x: torch.chunk(x, 2, 1)}, 3),
        ({"split": lambda x: (x[:, :8], x[:, 8:])}, 2),
        ({"split": lambda x: x.chunk(2, dim=1)[::-1]}, 2),
        ({"shuffle": in_three_groups}, 0),
        ({"shuffle": in_another_order}, 0),
        ({"shuffle": read_in_between}, 0),
        ({"shuffle": lambda x: x}, 0),
        ({"merge": lambda a, b: torch.cat((a, b, a, b), 1)[:, :16]}, 0),
    ],
    ids=str,
)
def test_shuffles(options, steps, channels_last):
    x = X.contiguous(memory_format=torch.channels_last) if channels_last else X
    model = made(Unit(**options))
    optimized = fastsep.optimize(model)
    assert len([step for step in steps_of(optimized) if isinstance(step, ShuffleStep)]) == steps
    with torch.no_grad():
        for other in (x, x[:1], x[:, :, :1, :1], x[:0]):
            torch.testing.assert_close(optimized(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [4, 12])
def test_branches_that_differ(channels):
    """Are not shuffled in turn: torch does it."""
    model = made(
        Unit(channels=channels, split=lambda x: x.chunk(2, dim=1), merge=lambda a, b: torch.cat((a, b), 1))
    )
    model.third[0] = nn.Conv2d((8 + channels) // 2, (8 + channels) // 2, 1)
    optimized = fastsep.optimize(model.eval())
    assert [step for step in steps_of(optimized) if isinstance(step, ShuffleStep)]
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_shuffle_that_permutes_the_plane_is_left():
    class Square(Unit):
        def forward(self, x):
            return torch.sin(self.shuffle(self.merge(*(branch(x) for branch in self.branches))))

    model = made(Square(in_other_places))
    optimized = fastsep.optimize(model)
    assert not [step for step in steps_of(optimized) if isinstance(step, ShuffleStep)]
    x = X[..., :5, :5]
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_shuffled_result_keeps_its_layout():
    """torch's is contiguous, whatever the input is."""

    class Last(Unit):
        def forward(self, x):
            return self.shuffle(self.merge(*(branch(x) for branch in self.branches)))

    check(made(Last()), X.contiguous(memory_format=torch.channels_last), fused=2)


def test_halves_that_are_written_to():
    """They do not overlap, so that neither sees what is written to the other."""

    def split(x):
        a, b = x.chunk(2, dim=1)
        a.mul_(2)
        return a, b

    check(made(Unit(split=split)), X, fused=2)


def test_all_of_a_network_behind_its_pooling(threads):
    model = made(
        nn.Sequential(Unit(), nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    )
    optimized = fastsep.optimize(model)
    assert len(targets_of(optimized)) == 3  # the sine is torch's
    large = torch.randn(3, 8, 120, 110)
    with torch.no_grad():
        first = optimized(large)
        torch.testing.assert_close(first, model(large), rtol=1e-4, atol=1e-5)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(optimized(large), first)


def test_native_shuffles_refuse_what_does_not_fit():
    series = _native.core.Series
    for fields in (
        (2, 1, 4, 5, 0, 8),
        (0, 1, 0, 5, 0, 0),
        (0, 1, 4, 5, 0, 9),
        (0, 1, 4, 5, 3, 3),
        (0, -1, 4, 5, 0, 8),
    ):
        with pytest.raises(ValueError, match=r"at least|dtype"):
            series([(fields, 0, 0, 0, 1, -1)], 2, [2])
    with pytest.raises(ValueError, match="expected one of the 1 before it"):
        series([((0, 1, 4, 5, 0, 8), 0, 0, 0, 1, -1)], 1, [1])
