"""fastsep::expanded_separable_conv2d, a separable convolution behind a dense one.

With a 1 x 1 kernel that is the inverted residual block of MobileNetV2, with a 3 x 3 of stride 2 on an image
the first two layers of MobileNetV1. For inference: a call that autograd watches is composed of torch's
operators.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, _ops
from ._activations import ACTIVATIONS
from ._ops import address, below_autograd, dense_weights, library

library.define(
    "expanded_separable_conv2d(Tensor input, Tensor expand_weight, Tensor depthwise_weight, "
    "Tensor pointwise_weight, Tensor? expand_bias, Tensor? depthwise_bias, Tensor? bias, Tensor? packed, "
    "SymInt[2] expand_stride, SymInt[4] expand_padding, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, str expand_activation, str mid_activation, str activation, bool residual) -> Tensor"
)
op: Callable[..., Tensor] = torch.ops.fastsep.expanded_separable_conv2d.default


def expanded_size(size: int, before: int, after: int, kernel: int, stride: int) -> int:
    return (size + before + after - kernel) // stride + 1


def output_shape(
    input: Tensor,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    *geometry: Any,
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """[N, K, OH, OW] for an input [N, E, H, W], and the plane between; RuntimeError that names a misfit.

    Without a pointwise_weight K is the depthwise half's.
    """
    if input.dim() != 4 or input.shape[1] < 1:
        raise RuntimeError(f"input must be [N, E, H, W], got {list(input.shape)}")
    n, channels, h, w = input.shape
    inner = depthwise_weight.shape[0]
    if expand_weight.dim() != 4 or expand_weight.shape[:2] != (inner, channels):
        raise RuntimeError(
            f"expand_weight must be [{inner}, {channels}, kernel_h, kernel_w] between the input "
            f"{list(input.shape)} and the depthwise_weight {list(depthwise_weight.shape)}, "
            f"got {list(expand_weight.shape)}"
        )
    if expand_bias is not None and expand_bias.shape != (inner,):
        raise RuntimeError(f"expand_bias must be [{inner}], got {list(expand_bias.shape)}")
    (sh, sw), (top, bottom, left, right) = geometry[:2]
    if min(sh, sw) < 1 or min(top, bottom, left, right) < 0:
        raise RuntimeError(
            f"expand_stride must be at least 1 and expand_padding at least 0, got {(sh, sw)} and "
            f"{((top, bottom), (left, right))}"
        )
    kh, kw = expand_weight.shape[2:]
    plane = expanded_size(h, top, bottom, kh, sh), expanded_size(w, left, right, kw, sw)
    if min(*plane, kh, kw) < 1:
        raise RuntimeError(
            f"the padded input must be at least as large as the expand_weight's kernel, {kh} x {kw}, got "
            f"{h + top + bottom} x {w + left + right}"
        )
    expanded = input.new_empty((1, 1, 1, 1)).expand(n, inner, *plane)
    weights = depthwise_weight, pointwise_weight, depthwise_bias, bias
    shape = _ops.output_shape(expanded, *weights, *geometry[2:5])
    _ops.check_types(input, *weights)
    for name, weight in (("expand_weight", expand_weight), ("expand_bias", expand_bias)):
        if weight is not None and (weight.dtype != input.dtype or weight.device != input.device):
            expected, got = f"{input.dtype} on {input.device}", f"{weight.dtype} on {weight.device}"
            raise RuntimeError(f"{name} must be {expected} like the input, got {got}")
    if geometry[-1] and shape != tuple(input.shape):
        raise RuntimeError(
            f"residual must be False where the output {list(shape)} is not like the input "
            f"{list(input.shape)}, got True"
        )
    return shape, plane


def compose(
    input: Tensor,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    expand_stride: Any,
    expand_padding: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    expand_activation: str,
    mid_activation: str,
    activation: str,
    residual: bool,
) -> Tensor:
    """The operator in torch's own terms: three convolutions with the activations behind them, and the sum."""
    top, bottom, left, right = expand_padding
    x, pads = (
        (input, (top, left))
        if top == bottom and left == right
        else (F.pad(input, (left, right, top, bottom)), (0, 0))
    )
    e = F.conv2d(x, expand_weight, expand_bias, tuple(expand_stride), pads)
    expanded = ACTIVATIONS[expand_activation].forward(e)
    tensors = expanded, depthwise_weight, pointwise_weight, depthwise_bias, bias
    y = _ops.compose(*tensors, stride, padding, dilation, mid_activation, activation)
    return y + input if residual else y


def native_problem(*args: Any) -> tuple[tuple[int, ...], tuple[int, int, int, int]]:
    """The 33 integers of a call on a channels-last input (see _core.pyi), and the output's shape.

    RuntimeError that names a misfit.
    """
    (input, expand_weight, depthwise_weight), geometry = args[:3], args[7:]
    shape, plane = output_shape(*args)
    n, channels, h, w = input.shape
    inner, _, kh, kw = depthwise_weight.shape
    e_stride, e_padding, stride, padding, dilation, expand, mid, act, residual = geometry
    problem = (
        *(n, inner, *plane, 0 if args[3] is None else shape[1], 1, kh, kw, *stride, *dilation, *padding),
        *(_native.DTYPES[input.dtype], 1, ACTIVATIONS[mid].code, ACTIVATIONS[act].code),
        *(residual, 0, channels, ACTIVATIONS[expand].code, h, w, *expand_weight.shape[2:]),
        *(*e_stride, e_padding[0], e_padding[2], 0),
    )
    return problem, shape


def is_finite(weight: Tensor) -> bool:
    return bool(weight.isfinite().all())


def cpu_kernel(*args: Any) -> Tensor:
    tensors, packed, geometry = args[:7], args[7], args[8:]
    input, expand_weight, depthwise_weight, pointwise_weight, expand_bias, depthwise_bias, bias = tensors
    core = _native.core
    native = core is not None and input.dtype in _native.DTYPES and input.dim() == 4 and len(input)
    # A patch beyond the plane is made of zeros, and zero times infinity is not zero; who packs has looked.
    patches = tuple(expand_weight.shape[2:]) != (1, 1)
    zeros_are_nothing = not patches or packed is not None or is_finite(expand_weight)
    if not (native and zeros_are_nothing and _ops.is_channels_last(input)):
        return _composed_kernel(*args)
    problem, shape = native_problem(*tensors, *geometry)
    input = input.contiguous(memory_format=torch.channels_last)
    output = torch.empty(shape, dtype=input.dtype, device=_native.CPU, memory_format=torch.channels_last)
    if _native.own_pool:
        core.set_num_threads(torch.get_num_threads())
    weights = depthwise_weight, depthwise_bias, pointwise_weight, bias, expand_weight, expand_bias
    if packed is not None and _ops.is_packed(packed, *weights):
        size = packed.numel() * packed.element_size()
        core.forward_packed(problem, "", input.data_ptr(), packed.data_ptr(), size, output.data_ptr())
        return output
    # Named, so that a dense copy lives until the call is over.
    dense = dense_weights(*weights)
    dw, db, pw, b, ew, eb = map(address, dense)
    core.forward(problem, "", input.data_ptr(), dw, db, pw, b, output.data_ptr(), ew, eb)
    return output


def _composed_kernel(*args: Any) -> Tensor:
    tensors, geometry = args[:7], args[8:]
    output_shape(*tensors, *geometry)
    return compose(*tensors, *geometry).contiguous(memory_format=_ops.memory_format(tensors[0]))


def _fake_kernel(*args: Any) -> Tensor:
    tensors, geometry = args[:7], args[8:]
    (shape, _), x = output_shape(*tensors, *geometry), tensors[0]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_ops.memory_format(x))


def _autograd_kernel(*args: Any) -> Tensor:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:7]):
        return compose(*args[:7], *args[8:])
    with below_autograd():
        return op(*args)


def _reported(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Prints the line of FASTSEP_VERBOSE; its case is the pair behind the dense convolution."""

    def reported_kernel(*args: Any) -> Tensor:
        begin = time.perf_counter()
        y = kernel(*args)
        tensors, packed, geometry = args[:7], args[7], args[8:]
        x, expand_weight, depthwise_weight, pointwise_weight, _, depthwise_bias, bias = tensors
        inner, channels, kh, kw = expand_weight.shape
        weights = "weights packed for this call" if packed is None else "weights frozen"
        how = f"behind a {kh} x {kw} convolution of {channels} channels, {weights}"
        path = _ops.path_of(x.dtype, how) if _ops.is_channels_last(x) else "composition | not channels-last"
        _, plane = output_shape(*tensors, *geometry)
        like = torch.empty_strided((len(x), inner, *plane), (0, 1, 0, 0), dtype=x.dtype)
        pair = like, depthwise_weight, pointwise_weight, depthwise_bias, bias
        _ops.report(path, begin, pair, (*geometry[2:5], *geometry[6:8]), nhwc=True)
        return y

    return reported_kernel


if _ops.VERBOSE:
    cpu_kernel = _reported(cpu_kernel)


def _from_dispatcher(*args: Any) -> Tensor:
    """The kernel for tensors that nobody has looked at."""
    names = "input", "expand_weight", "depthwise_weight", "pointwise_weight"
    _native.require_memory((*names, "expand_bias", "depthwise_bias", "bias", "packed"), *args[:8])
    return cpu_kernel(*args)


library.impl("expanded_separable_conv2d", _from_dispatcher, "CPU")
library.impl("expanded_separable_conv2d", _composed_kernel, "CompositeExplicitAutograd")
library.impl("expanded_separable_conv2d", _autograd_kernel, "Autograd")
_ops._library.register_fake("fastsep::expanded_separable_conv2d", _fake_kernel, lib=library)
