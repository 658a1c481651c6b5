"""The gradient of fastsep::separable_conv2d. Input and weights are kept, the rest is computed again."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._activations import ACTIVATIONS
from ._ops import compose, library, op

below_autograd = torch._C._AutoDispatchBelowAutograd

convolution_backward = torch.ops.aten.convolution_backward


class SeparableConv2dFunction(torch.autograd.Function):
    """Takes and returns what the operator does."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:5])
        ctx.geometry = args[6:]
        with below_autograd():
            return op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args: Any = (*grads, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[:5])
        return *backward(*args), *(None,) * 6


class TransformedFunction(SeparableConv2dFunction):
    """In the form that torch.func wants, which costs 15 us more in each call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.geometry = inputs[6:]


def backward(
    grad: Tensor,
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mid_activation: str,
    activation: str,
    needed: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the five tensors that are needed, by operators that can be differentiated again.

    With t = depthwise(x) + depthwise_bias, u = mid_activation(t), v = pointwise(u) + bias, y = activation(v)
    it goes y -> v -> (u, pointwise_weight, bias) and u -> t -> (x, depthwise_weight, depthwise_bias).
    """
    need_x, need_dw, need_pw, need_db, need_b = needed
    need_u = need_x or need_dw or need_db
    top, bottom, left, right = padding
    even = top == bottom and left == right
    x = input if even else F.pad(input, (left, right, top, bottom))
    pads = [top, left] if even else [0, 0]
    inner, outer, groups = depthwise_weight.shape[0], pointwise_weight.shape[0], input.shape[1]
    stride, dilation = list(stride), list(dilation)

    t = F.conv2d(x, depthwise_weight, depthwise_bias, stride, pads, dilation, groups)
    u = ACTIVATIONS[mid_activation].forward(t)
    if activation != "identity":
        grad = ACTIVATIONS[activation].backward(grad, F.conv2d(u, pointwise_weight, bias))
    grad_u, grad_pw, grad_b = convolution_backward(
        *(grad, u, pointwise_weight, [outer], [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        [need_u, need_pw, need_b],
    )
    if not need_u:
        return None, None, grad_pw, None, grad_b
    grad_x, grad_dw, grad_db = convolution_backward(
        ACTIVATIONS[mid_activation].backward(grad_u, t),
        *(x, depthwise_weight, [inner], stride, pads, dilation, False, [0, 0], groups),
        [need_x, need_dw, need_db],
    )
    if need_x and not even:
        h, w = input.shape[2:]
        grad_x = grad_x[:, :, top : top + h, left : left + w]
    return grad_x, grad_dw, grad_pw, grad_db, grad_b


def apply(*args: Any) -> Tensor:
    """The operator, watched by autograd and torch.func."""
    transformed = torch._C._are_functorch_transforms_active()
    function: Any = TransformedFunction if transformed else SeparableConv2dFunction
    return cast("Tensor", function.apply(*args))


def autograd_kernel(*args: Any) -> Tensor:
    """The operator for tensors that autograd watches, whatever transform, compiler or exporter calls it."""
    if forward_ad._current_level >= 0:
        return compose(*args[:5], *args[6:])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:5]):
        return apply(*args)
    with below_autograd():
        return op(*args)


library.impl("separable_conv2d", autograd_kernel, "Autograd")
