"""The textbook formula in plain loops: slow, and short enough to be believed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _ops, functional
from ._activations import activation_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from .functional import Padding, Size


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0 * x


def _clamp(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x  # NaN stays NaN


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "identity": lambda x: x,
    "relu": lambda x: _clamp(x, 0.0, math.inf),
    "relu6": lambda x: _clamp(x, 0.0, 6.0),
    "leaky_relu": lambda x: 0.01 * x if x < 0 else x,
    "silu": lambda x: x * _sigmoid(x),
    "hardswish": lambda x: x * _clamp(x + 3, 0.0, 6.0) / 6,
    "hardsigmoid": lambda x: _clamp(x + 3, 0.0, 6.0) / 6,
    "sigmoid": _sigmoid,
    "tanh": math.tanh,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    depthwise_bias: Tensor | None = None,
    mid_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """fastsep.separable_conv2d with every sum written out, in double precision, rounded to the input's dtype.

    >>> separable_conv2d(torch.ones(1, 3, 4, 4), torch.ones(3, 1, 3, 3), torch.ones(2, 3, 1, 1)).shape
    torch.Size([1, 2, 2, 2])

    Arguments, shapes, errors and source are those of fastsep.separable_conv2d.
    """
    if input.dim() == 3:
        return separable_conv2d(
            *(input[None], depthwise_weight, pointwise_weight, bias, stride, padding, dilation),
            depthwise_bias=depthwise_bias,
            mid_activation=mid_activation,
            activation=activation,
        )[0]
    sh, sw = stride_hw = functional.parse_pair(stride, "stride")
    dh, dw = dilation_hw = functional.parse_pair(dilation, "dilation")
    pads = functional.parse_padding(padding)
    if isinstance(pads, str):
        kernel = depthwise_weight.shape[2], depthwise_weight.shape[3]
        pads = functional.same_padding(input, kernel, stride_hw, dilation_hw)
    top, _bottom, left, _right = pads
    mid_act = ACTIVATIONS[activation_name(mid_activation, "mid_activation")]
    act = ACTIVATIONS[activation_name(activation, "activation")]
    weights = (depthwise_weight, pointwise_weight, depthwise_bias, bias)
    out_n, out_k, out_h, out_w = _ops.output_shape(input, *weights, stride_hw, pads, dilation_hw)
    channels, height, width = input.shape[1:]
    inner, _, kernel_h, kernel_w = depthwise_weight.shape
    multiplier = inner // channels

    x = input.tolist()  # Python's floats are doubles
    w_depth = depthwise_weight.tolist()
    w_point = pointwise_weight.tolist()
    b_depth = [0.0] * inner if depthwise_bias is None else depthwise_bias.tolist()
    b_point = [0.0] * out_k if bias is None else bias.tolist()

    y = torch.empty((out_n, out_k, out_h, out_w), dtype=torch.float64)
    for n in range(out_n):
        for oy in range(out_h):
            for ox in range(out_w):
                t = []
                for i in range(inner):
                    total = b_depth[i]
                    for r in range(kernel_h):
                        for s in range(kernel_w):
                            iy = oy * sh - top + r * dh
                            ix = ox * sw - left + s * dw
                            if 0 <= iy < height and 0 <= ix < width:
                                total += x[n][i // multiplier][iy][ix] * w_depth[i][0][r][s]
                    t.append(mid_act(total))
                for k in range(out_k):
                    total = b_point[k]
                    for i in range(inner):
                        total += t[i] * w_point[k][i][0][0]
                    y[n, k, oy, ox] = act(total)
    return y.to(input.dtype).contiguous(memory_format=_ops.memory_format(input))
