"""fastsep::separable_conv2d, the one registered operator: what it checks, what it runs, what it means.

All arguments pass output_shape() before any native code sees them, whoever calls the operator.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _native
from ._activations import ACTIVATIONS
from ._case import case_of, format_case

Ints = Sequence[int]

VERBOSE = os.environ.get("FASTSEP_VERBOSE", "0") not in ("", "0")

_library: Any = torch.library  # Any, for its functions have no types
library = _library.Library("fastsep", "DEF")
library.define(
    "separable_conv2d(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, "
    "Tensor? depthwise_bias, Tensor? bias, Tensor? packed, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, str mid_activation, str activation) -> Tensor"
)
op: Callable[..., Tensor] = torch.ops.fastsep.separable_conv2d.default


def output_shape(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> tuple[int, int, int, int]:
    """[N, K, OH, OW] for an input [N, C, H, W], or a RuntimeError that names the misfit."""
    x_shape, d_shape, p_shape = input.shape, depthwise_weight.shape, pointwise_weight.shape
    if len(x_shape) != 4:
        raise RuntimeError(f"input must be [N, C, H, W] or [C, H, W], got {list(x_shape)}")
    if len(d_shape) != 4:
        raise RuntimeError(f"depthwise_weight must have 4 dimensions, got {list(d_shape)}")
    if len(p_shape) != 4:
        raise RuntimeError(f"pointwise_weight must have 4 dimensions, got {list(p_shape)}")
    n, c, h, w = x_shape
    inner, one, kh, kw = d_shape
    k, depth, ph, pw = p_shape
    (sh, sw), (dh, dw), (top, bottom, left, right) = stride, dilation, padding
    if c < 1 or h < 1 or w < 1:
        raise RuntimeError(f"input must have at least one channel, row and column, got {list(x_shape)}")
    if one != 1 or inner < 1 or inner % c or kh < 1 or kw < 1:
        raise RuntimeError(
            f"depthwise_weight must be [C * multiplier, 1, kernel_h, kernel_w] for the input {list(x_shape)} "
            f"with its C = {c} channels, got {list(d_shape)}"
        )
    if depth != inner or ph != 1 or pw != 1 or k < 1:
        raise RuntimeError(
            f"pointwise_weight must be [K, {inner}, 1, 1] behind the depthwise_weight "
            f"{list(d_shape)}, got {list(p_shape)}"
        )
    if depthwise_bias is not None and depthwise_bias.shape != (inner,):
        raise RuntimeError(f"depthwise_bias must be [{inner}], got {list(depthwise_bias.shape)}")
    if bias is not None and bias.shape != (k,):
        raise RuntimeError(f"bias must be [{k}], got {list(bias.shape)}")
    if sh < 1 or sw < 1:
        raise RuntimeError(f"stride must be at least 1, got {(sh, sw)}")
    if dh < 1 or dw < 1:
        raise RuntimeError(f"dilation must be at least 1, got {(dh, dw)}")
    if top < 0 or bottom < 0 or left < 0 or right < 0:
        raise RuntimeError(f"padding must be at least 0, got {((top, bottom), (left, right))}")
    room_h = h + top + bottom - dh * (kh - 1) - 1
    room_w = w + left + right - dw * (kw - 1) - 1
    if room_h < 0 or room_w < 0:
        raise RuntimeError(
            f"the padded input must be at least as large as the dilated kernel, {dh * (kh - 1) + 1} x "
            f"{dw * (kw - 1) + 1}, got {h + top + bottom} x {w + left + right}"
        )
    return n, k, room_h // sh + 1, room_w // sw + 1


def check_types(input: Tensor, *weights: Tensor | None) -> None:
    """RuntimeError for mixed dtypes or devices, and for a dtype that no convolution is made of."""
    if not (input.is_floating_point() or input.is_complex()):
        raise RuntimeError(f"input must be floating point or complex, got {input.dtype}")
    names = ("depthwise_weight", "pointwise_weight", "depthwise_bias", "bias")
    for name, weight in zip(names, weights, strict=True):
        if weight is not None and weight.dtype != input.dtype:
            raise RuntimeError(f"{name} must have the input's dtype, {input.dtype}, got {weight.dtype}")
        if weight is not None and weight.device != input.device:
            raise RuntimeError(f"{name} must be on the input's device, {input.device}, got {weight.device}")


def is_channels_last(x: Tensor) -> bool:
    """Whether the result for this [N, C, H, W] input is channels-last; as torch decides, by the strides."""
    _, c, h, w = x.shape
    if x.is_contiguous():
        # One channel or one pixel can be both; the strides still tell how the tensor was made.
        return (c == 1 or h * w == 1) and c * h * w > 1 and x.stride(1) == 1 and x.stride(3) == c
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    least = 1
    for size, stride in ((c, x.stride(1)), (w, x.stride(3)), (h, x.stride(2))):
        if stride < least:  # strides of a slice of a channels-last tensor grow in this order
            return False
        least = stride * size
    return True


def memory_format(x: Tensor) -> torch.memory_format:
    """The format that the result for this [N, C, H, W] input has."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def compose(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    mid_activation: str,
    activation: str,
) -> Tensor:
    """The operator in torch's own terms: two convolutions with the activations behind them."""
    top, bottom, left, right = padding
    if top != bottom or left != right:
        input = F.pad(input, (left, right, top, bottom))
        top = left = 0
    groups = input.shape[1]
    t = F.conv2d(input, depthwise_weight, depthwise_bias, tuple(stride), (top, left), tuple(dilation), groups)
    y = F.conv2d(ACTIVATIONS[mid_activation].forward(t), pointwise_weight, bias)
    return ACTIVATIONS[activation].forward(y)


# The kernels. The arguments are compose()'s five tensors, the packed weights, and the rest of compose()'s.


def cpu_kernel(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    mid_activation: str,
    activation: str,
) -> Tensor:
    dtype = input.dtype
    code = _native.DTYPES.get(dtype)
    core = _native.core
    if core is None or code is None:
        return _composed_kernel(
            *(input, depthwise_weight, pointwise_weight, depthwise_bias, bias, packed),
            *(stride, padding, dilation, mid_activation, activation),
        )
    n, k, oh, ow = output_shape(
        input, depthwise_weight, pointwise_weight, depthwise_bias, bias, stride, padding, dilation
    )
    if (
        depthwise_weight.dtype is not dtype
        or pointwise_weight.dtype is not dtype
        or (depthwise_bias is not None and depthwise_bias.dtype is not dtype)
        or (bias is not None and bias.dtype is not dtype)
    ):
        check_types(input, depthwise_weight, pointwise_weight, depthwise_bias, bias)
    _, c, h, w = input.shape
    inner, _, kh, kw = depthwise_weight.shape
    (sh, sw), (dh, dw), (top, bottom, left, right) = stride, dilation, padding
    if n * max(inner, k) * (h + top + bottom) * (w + left + right) >= 1 << 57:
        raise RuntimeError(f"input {list(input.shape)} and padding {list(padding)} are too large to address")
    nhwc = is_channels_last(input)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    output = torch.empty((n, k, oh, ow), dtype=dtype, memory_format=layout)
    if n == 0:
        return output
    if not input.is_contiguous(memory_format=layout):
        input = input.contiguous(memory_format=layout)
    if _native.own_pool:
        core.set_num_threads(torch.get_num_threads())
    mid, act, m = ACTIVATIONS[mid_activation].code, ACTIVATIONS[activation].code, inner // c
    problem = (n, c, h, w, k, m, kh, kw, sh, sw, dh, dw, top, bottom, left, right, code, nhwc, mid, act)
    # (A copy that a compiler made of the packed weights may lie anywhere.)
    if packed is not None and packed.data_ptr() % 64 == 0 and packed.is_contiguous():
        size = packed.numel() * packed.element_size()
        core.forward_packed(problem, "", input.data_ptr(), packed.data_ptr(), size, output.data_ptr())
        return output
    # Named, so that a dense copy lives until the call is over.
    depthwise_weight, pointwise_weight = depthwise_weight.contiguous(), pointwise_weight.contiguous()
    depthwise_bias = None if depthwise_bias is None else depthwise_bias.contiguous()
    bias = None if bias is None else bias.contiguous()
    db = 0 if depthwise_bias is None else depthwise_bias.data_ptr()
    b = 0 if bias is None else bias.data_ptr()
    weights = depthwise_weight.data_ptr(), db, pointwise_weight.data_ptr(), b
    core.forward(problem, "", input.data_ptr(), *weights, output.data_ptr())
    return output


def _composed_kernel(*args: Any) -> Tensor:
    tensors, geometry = args[:5], args[6:]
    output_shape(*tensors, *geometry[:3])
    check_types(*tensors)
    return compose(*tensors, *geometry).contiguous(memory_format=memory_format(tensors[0]))


def _fake_kernel(*args: Any) -> Tensor:
    tensors, geometry = args[:5], args[6:]
    shape = output_shape(*tensors, *geometry[:3])
    check_types(*tensors)
    x = tensors[0]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _vmap_rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    """A batched input is more images; with batched weights there is a call for each."""
    if all(dim is None for dim in in_dims[1:5]):
        images = args[0].movedim(in_dims[0], 0)
        y = op(images.flatten(0, 1), *args[1:])
        return y.view(*images.shape[:2], *y.shape[1:]), 0
    tensors = list(zip(args[:5], in_dims[:5], strict=True))
    calls = [
        op(*(x if dim is None else x.select(dim, i) for x, dim in tensors), None, *args[6:])
        for i in range(info.batch_size)
    ]
    return torch.stack(calls), 0


def _flops(_input: Ints, depthwise_weight: Ints, *_: Any, out_shape: Ints) -> int:
    inner, _one, kh, kw = depthwise_weight
    n, k, oh, ow = out_shape
    return 2 * n * oh * ow * inner * (kh * kw + k)


def report(path: str, begin: float, tensors: tuple[Any, ...], geometry: tuple[Any, ...]) -> None:
    """A line on stderr: the path taken and why, the time, and the case for `python -m fastsep replay`."""
    milliseconds = (time.perf_counter() - begin) * 1e3
    case = case_of(*tensors, *geometry, nhwc=is_channels_last(tensors[0]))
    print(f"fastsep: {path} | {milliseconds:.3f} ms | {format_case(case)}", file=sys.stderr, flush=True)


def _reported(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reported_kernel(*args: Any) -> Tensor:
        begin = time.perf_counter()
        y = kernel(*args)
        dtype, core = args[0].dtype, _native.core
        if core is None:
            path = f"composition | {_native.missing}"
        elif dtype not in _native.DTYPES:
            path = f"composition | no native kernel for {dtype}"
        else:
            weights = "packed for this call" if args[5] is None else "frozen"
            path = f"native {core.last_isa()} | weights {weights}, {core.thread_pool()} threads"
        report(path, begin, args[:5], args[6:])
        return y

    return reported_kernel


if VERBOSE:
    cpu_kernel = _reported(cpu_kernel)

library.impl("separable_conv2d", cpu_kernel, "CPU")
library.impl("separable_conv2d", _composed_kernel, "CompositeExplicitAutograd")
_library.register_fake("fastsep::separable_conv2d", _fake_kernel, lib=library)
_library.register_vmap("fastsep::separable_conv2d", _vmap_rule, lib=library)
register_flop_formula(torch.ops.fastsep.separable_conv2d)(_flops)
