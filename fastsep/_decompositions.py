"""The operator as plain convolutions, for programs that do not know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import _ops

_decomp: Any = torch._decomp  # Any, for its functions have no types


# torch.onnx.export goes by this table. What torch.compile and torch.export make keeps the operator.
@_decomp.register_decomposition(torch.ops.fastsep.separable_conv2d.default)  # type: ignore[untyped-decorator]
def _separable_conv2d(*args: Any) -> Tensor:
    return _ops.compose(*args[:5], *args[6:])


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """For torch.export: turns the package's operator into convolutions and activations of torch.

    >>> program = torch.export.export(SeparableConv2d(3, 8, 3), (torch.randn(1, 3, 9, 9),))
    >>> program = program.run_decompositions(fastsep.decompositions())

    An exported program keeps the operator otherwise, and runs where fastsep is installed. torch.onnx.export
    needs no such step.
    """
    return {torch.ops.fastsep.separable_conv2d.default: cast("Callable[..., Tensor]", _separable_conv2d)}
