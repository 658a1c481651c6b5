"""How far a fused computation is from what it replaces."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .chains import Reader
from .patterns import Match


def tolerance(outputs: Any) -> float:
    """The largest error() that rounding explains in a deep network: ten thousand times the dtype's eps."""
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    return 1e4 * max((torch.finfo(t.dtype).eps for t in tensors), default=0.0)


def largest_error(outputs: Any, expected: Any) -> float:
    """The largest difference between tensors in any nesting, relative to the largest expected of each.

    Infinite where shapes or NaNs differ.
    """
    ours, theirs = tree_leaves(outputs), tree_leaves(expected)
    if len(ours) != len(theirs):
        return math.inf
    return max((_error(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _error(got: Any, expected: Any) -> float:
    if not isinstance(expected, Tensor):
        return 0.0 if got == expected else math.inf
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return math.inf
    if not expected.numel():
        return 0.0
    same = (got == expected) | (got.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, (got.double() - expected.double()).abs())
    finite = expected.double().abs().nan_to_num(0.0, 0.0, 0.0)
    largest = difference.nan_to_num(math.inf).max().item()
    return largest / max(finite.max().item(), torch.finfo(torch.float32).tiny) if largest else 0.0


def tolerance_of(match: Match) -> float:
    assert match.convolution is not None
    return 1e4 * torch.finfo(match.convolution.weight.dtype).eps


def match_error(reader: Reader, match: Match) -> float:
    """The error of a match's step on a small input of normal numbers."""
    convolution = match.convolution
    assert convolution is not None
    (kh, kw), (sh, sw) = convolution.weight.shape[2:], convolution.stride
    (dh, dw), generator = convolution.dilation, torch.Generator().manual_seed(0)
    h, w, channels = dh * (kh - 1) + 1 + 3 * sh, dw * (kw - 1) + 1 + 3 * sw, convolution.in_channels
    if match.expand is not None:
        (eh, ew), (esh, esw) = match.expand.weight.shape[2:], match.expand.stride
        h, w, channels = (h - 1) * esh + eh, (w - 1) * esw + ew, match.expand.in_channels
    size = 2, channels, h, w
    x = torch.randn(size, generator=generator, dtype=torch.float64).to(convolution.weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return largest_error(match.step(x), match.run(reader, x))
