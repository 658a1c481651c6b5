"""The operators as plain convolutions, for programs that do not know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _expanded, _ops


def _separable_conv2d(*args: Any) -> Tensor:
    return _ops.compose(*args[:5], *args[6:])


def _depthwise_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    arguments: Any = input, weight, None, bias, None, *geometry, "identity"
    return _ops.compose(*arguments)


def _expanded_separable_conv2d(*args: Any) -> Tensor:
    return _expanded.compose(*args[:7], *args[8:])


_TABLE: dict[Any, Callable[..., Tensor]] = {
    torch.ops.fastsep.separable_conv2d.default: _separable_conv2d,
    torch.ops.fastsep.depthwise_conv2d.default: _depthwise_conv2d,
    torch.ops.fastsep.expanded_separable_conv2d.default: _expanded_separable_conv2d,
}


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """For torch.export: turns the package's operators into convolutions and activations of torch.

    >>> program = torch.export.export(SeparableConv2d(3, 8, 3), (torch.randn(1, 3, 9, 9),))
    >>> program = program.run_decompositions(fastsep.decompositions())

    An exported program keeps the operators otherwise, and runs where fastsep is installed. torch.onnx.export
    needs no such step.
    """
    return dict(_TABLE)
