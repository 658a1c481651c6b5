"""The gradients of fastsep's operators. Input and weights are kept, the rest is computed again."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backward, _ops
from ._ops import below_autograd

_is_batched = torch._C._functorch.is_legacy_batchedtensor


class SeparableConv2dFunction(torch.autograd.Function):
    """Takes and returns what the operator does."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y = _ops.run(*args)
        saved = y if _backward.wants_output(args[0], args[10]) else None
        ctx.save_for_backward(*args[:5], saved)
        ctx.geometry = args[6:]
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,), needed = grads, ctx.needs_input_grad[:5]
        if grad is None:
            return (None,) * 11
        *tensors, saved = ctx.saved_tensors
        # Gradients that will be differentiated, or come many at a time, which only torch's own operators can.
        if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and _is_batched(grad)):
            given: Any = (grad, *tensors, *ctx.geometry, needed)
            return *_backward.compose(*given), *(None,) * 6
        gradients = iter(_backward.run(grad, *tensors, saved, *ctx.geometry, needed))
        return *(next(gradients) if need else None for need in needed), *(None,) * 6


class DepthwiseConv2dFunction(SeparableConv2dFunction):
    """The same by its own name, where there is no pointwise half."""


class TransformedFunction(SeparableConv2dFunction):
    """In the form that torch.func wants, which costs 15 us more in each call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _ops.call(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5], None)
        ctx.geometry = inputs[6:]


def apply(*args: Any) -> Tensor:
    """The operator that takes these arguments, watched by autograd and torch.func."""
    function: Any = SeparableConv2dFunction if args[2] is not None else DepthwiseConv2dFunction
    if torch._C._are_functorch_transforms_active():
        function = TransformedFunction
    return cast("Tensor", function.apply(*args))


def autograd_kernel(*args: Any) -> Tensor:
    """The operator for tensors that autograd watches, whatever transform, compiler or exporter calls it."""
    # Forward mode wants torch's own operators, and so do torch.func's transforms once they are this far.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _ops.compose(*args[:5], *args[6:])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:5]):
        return apply(*args)
    with below_autograd():
        return _ops.call(*args)


_ops.implement(autograd_kernel, "Autograd")
