"""fastsep::separable_conv2d and fastsep::depthwise_conv2d: what they check, what they run, what they mean.

Inside the package the second is the first without a pointwise_weight: the depthwise half alone, whose
activation is the mid_activation. All arguments pass output_shape() before any native code sees them, whoever
calls an operator.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _native
from ._activations import ACTIVATIONS
from ._case import case_of, format_case
from ._native import CPU

Ints = Sequence[int]

below_autograd = torch._C._AutoDispatchBelowAutograd

VERBOSE = os.environ.get("FASTSEP_VERBOSE", "0") not in ("", "0")

_library: Any = torch.library  # Any, for its functions have no types
library = _library.Library("fastsep", "DEF")
library.define(
    "separable_conv2d(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, "
    "Tensor? depthwise_bias, Tensor? bias, Tensor? packed, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, str mid_activation, str activation) -> Tensor"
)
library.define(
    "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, "
    "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, str activation) -> Tensor"
)
op: Callable[..., Tensor] = torch.ops.fastsep.separable_conv2d.default
depthwise_op: Callable[..., Tensor] = torch.ops.fastsep.depthwise_conv2d.default


def tensor_names(pointwise_weight: Any) -> tuple[str, str, str, str, str]:
    """What the caller knows the five tensors by."""
    if pointwise_weight is None:
        return "input", "weight", "", "bias", ""
    return "input", "depthwise_weight", "pointwise_weight", "depthwise_bias", "bias"


def output_shape(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor | None,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> tuple[int, int, int, int]:
    """[N, K, OH, OW] for an input [N, C, H, W], or a RuntimeError that names the misfit."""
    x_shape, d_shape = input.shape, depthwise_weight.shape
    if len(x_shape) != 4:
        raise RuntimeError(f"input must be [N, C, H, W] or [C, H, W], got {list(x_shape)}")
    if len(d_shape) != 4:
        name = tensor_names(pointwise_weight)[1]
        raise RuntimeError(f"{name} must have 4 dimensions, got {list(d_shape)}")
    n, c, h, w = x_shape
    inner, one, kh, kw = d_shape
    (sh, sw), (dh, dw), (top, bottom, left, right) = stride, dilation, padding
    if c < 1 or h < 1 or w < 1:
        raise RuntimeError(f"input must have at least one channel, row and column, got {list(x_shape)}")
    if one != 1 or inner < 1 or inner % c or kh < 1 or kw < 1:
        raise RuntimeError(
            f"{tensor_names(pointwise_weight)[1]} must be [C * multiplier, 1, kernel_h, kernel_w] for the "
            f"input {list(x_shape)} with its C = {c} channels, got {list(d_shape)}"
        )
    k = inner
    if pointwise_weight is not None:
        p_shape = pointwise_weight.shape
        if len(p_shape) != 4:
            raise RuntimeError(f"pointwise_weight must have 4 dimensions, got {list(p_shape)}")
        k, depth, ph, pw = p_shape
        if depth != inner or ph != 1 or pw != 1 or k < 1:
            raise RuntimeError(
                f"pointwise_weight must be [K, {inner}, 1, 1] behind the depthwise_weight "
                f"{list(d_shape)}, got {list(p_shape)}"
            )
    if depthwise_bias is not None and depthwise_bias.shape != (inner,):
        name = tensor_names(pointwise_weight)[3]
        raise RuntimeError(f"{name} must be [{inner}], got {list(depthwise_bias.shape)}")
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
    names = tensor_names(weights[1])[1:]
    given = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight is not None]
    (_, first), *rest = given
    if first.dtype != input.dtype and all(weight.dtype == first.dtype for _, weight in rest):
        raise RuntimeError(f"input must have the weights' dtype, {first.dtype}, got {input.dtype}")
    if first.device != input.device and all(weight.device == first.device for _, weight in rest):
        raise RuntimeError(f"input must be on the weights' device, {first.device}, got {input.device}")
    for name, weight in given:
        if weight.dtype != input.dtype:
            raise RuntimeError(f"{name} must have the input's dtype, {input.dtype}, got {weight.dtype}")
        if weight.device != input.device:
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
    pointwise_weight: Tensor | None,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    mid_activation: str,
    activation: str,
) -> Tensor:
    """The operators in torch's own terms: one or two convolutions with the activations behind them."""
    top, bottom, left, right = padding
    # Symbols of a compiler are not asked whether they are equal.
    if any(type(pad) is not int for pad in padding) or top != bottom or left != right:
        input = F.pad(input, (left, right, top, bottom))
        top = left = 0
    groups = input.shape[1]
    t = F.conv2d(input, depthwise_weight, depthwise_bias, tuple(stride), (top, left), tuple(dilation), groups)
    u = ACTIVATIONS[mid_activation].forward(t)
    if pointwise_weight is None:
        return u
    return ACTIVATIONS[activation].forward(F.conv2d(u, pointwise_weight, bias))


def native_problem(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor | None,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    mid_activation: str,
    activation: str,
) -> tuple[tuple[int, ...], tuple[int, int, int, int], torch.memory_format]:
    """The problem for the native functions (see _core.pyi), the output's shape and both's format; checked."""
    dtype = input.dtype
    shape = output_shape(
        input, depthwise_weight, pointwise_weight, depthwise_bias, bias, stride, padding, dilation
    )
    if (
        depthwise_weight.dtype is not dtype
        or (pointwise_weight is not None and pointwise_weight.dtype is not dtype)
        or (depthwise_bias is not None and depthwise_bias.dtype is not dtype)
        or (bias is not None and bias.dtype is not dtype)
    ):
        check_types(input, depthwise_weight, pointwise_weight, depthwise_bias, bias)
    n, c, h, w = input.shape
    inner, _, kh, kw = depthwise_weight.shape
    (sh, sw), (dh, dw), (top, bottom, left, right) = stride, dilation, padding
    if n * max(inner, shape[1]) * (h + top + bottom) * (w + left + right) >= 1 << 57:
        raise RuntimeError(f"input {list(input.shape)} and padding {list(padding)} are too large to address")
    nhwc = is_channels_last(input)
    problem = (
        *(n, c, h, w, 0 if pointwise_weight is None else shape[1], inner // c, kh, kw, sh, sw, dh, dw),
        *(top, bottom, left, right, _native.NUMBERS[dtype], nhwc),
        *(ACTIVATIONS[mid_activation].code, ACTIVATIONS[activation].code),
    )
    return problem, shape, torch.channels_last if nhwc else torch.contiguous_format


def remember(cache: dict[Any, Any], key: Any, value: Any, limit: int) -> None:
    """Puts a value into a cache, and the oldest out of a full one."""
    if len(cache) >= limit:
        cache.pop(list(cache)[0], None)  # noqa: RUF015 (another thread may change it between iter() and next())
    cache[key] = value


def address(tensor: Tensor | None) -> int:
    """For the native functions, where 0 is a tensor that is not there."""
    return 0 if tensor is None else tensor.data_ptr()


# The kernels. The arguments are compose()'s five tensors, the packed weights, and the rest of compose()'s.


def cpu_kernel(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor | None,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    *geometry: Any,
) -> Tensor:
    core = _native.core
    if core is None or input.dtype not in _native.DTYPES:
        tensors = input, depthwise_weight, pointwise_weight, depthwise_bias, bias
        return composed_kernel(*tensors, packed, *geometry)
    if packed is not None and not is_packed(packed, depthwise_weight, depthwise_bias, pointwise_weight, bias):
        packed = None
    calls: Any = None if packed is None else packed.calls  # type: ignore[attr-defined]
    # A layer is asked for the same again and again. (From the dispatcher come lists, which are no keys.)
    key = (input.shape, input.stride(), input.dtype, geometry) if type(geometry[0]) is tuple else None
    known = calls.get(key) if calls else None
    if known is None:
        known = native_problem(input, depthwise_weight, pointwise_weight, depthwise_bias, bias, *geometry)
        if calls is not None and key is not None:
            remember(calls, key, known, 16)
    problem, shape, layout = known
    output = torch.empty(shape, dtype=input.dtype, device=CPU, memory_format=layout)
    if shape[0] == 0:
        return output
    if not input.is_contiguous(memory_format=layout):
        input = input.contiguous(memory_format=layout)
    if _native.own_pool:
        core.set_num_threads(torch.get_num_threads())
    if packed is not None:
        size = packed.numel() * packed.element_size()
        core.forward_packed(problem, "", input.data_ptr(), packed.data_ptr(), size, output.data_ptr())
        return output
    # Named, so that a dense copy lives until the call is over.
    dw, db, pw, b = dense_weights(depthwise_weight, depthwise_bias, pointwise_weight, bias)
    weights = address(dw), address(db), address(pw), address(b)
    core.forward(problem, "", input.data_ptr(), *weights, output.data_ptr())
    return output


def is_packed(packed: Tensor, *weights: Tensor | None) -> bool:
    """Whether these are the weights that were packed, and as they were then, in the order of _native.pack().

    A copy that a compiler made of the packed weights may lie anywhere, and knows of none; nor do from now on
    those whose weights were written to.
    """
    made_of = getattr(packed, "made_of", None)
    if made_of is None or made_of.matches(*weights):
        return made_of is not None
    packed.made_of = None  # type: ignore[attr-defined]
    return False


def dense_weights(*weights: Tensor | None) -> list[Tensor | None]:
    """As the native functions want them: row-major."""
    return [None if weight is None else weight.contiguous() for weight in weights]


def composed_kernel(*args: Any) -> Tensor:
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
        y = call(images.flatten(0, 1), *args[1:])
        return y.view(*images.shape[:2], *y.shape[1:]), 0
    tensors = list(zip(args[:5], in_dims[:5], strict=True))
    calls = [
        call(*(x if dim is None else x.select(dim, i) for x, dim in tensors), None, *args[6:])
        for i in range(info.batch_size)
    ]
    return torch.stack(calls), 0


def _flops(_input: Ints, depthwise_weight: Ints, *_: Any, out_shape: Ints) -> int:
    inner, _one, kh, kw = depthwise_weight
    n, k, oh, ow = out_shape
    return 2 * n * oh * ow * inner * (kh * kw + k)


def _depthwise_flops(_input: Ints, weight: Ints, *_: Any, out_shape: Ints) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[2:])


def report(
    path: str,
    begin: float,
    tensors: tuple[Any, ...],
    geometry: tuple[Any, ...],
    *,
    nhwc: bool | None = None,
    took: str = "",
) -> None:
    """A line on stderr: the path taken and why, the time, and the case for `python -m fastsep replay`."""
    took = took or f"{(time.perf_counter() - begin) * 1e3:.3f} ms"
    case = case_of(*tensors, *geometry, nhwc=is_channels_last(tensors[0]) if nhwc is None else nhwc)
    print(f"fastsep: {path} | {took} | {format_case(case)}", file=sys.stderr, flush=True)


def _reported(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reported_kernel(*args: Any) -> Tensor:
        begin = time.perf_counter()
        y = kernel(*args)
        weights = "weights packed for this call" if args[5] is None else "weights frozen"
        report(path_of(args[0].dtype, weights), begin, args[:5], args[6:])
        return y

    return reported_kernel


def path_of(dtype: torch.dtype, how: str) -> str:
    """What a kernel for the CPU just did, and how or why."""
    core = _native.core
    if core is None:
        return f"composition | {_native.missing}"
    if dtype not in _native.DTYPES:
        return f"composition | no native kernel for {dtype}"
    return f"native {core.last_isa()} | {how}, {core.thread_pool()} threads"


if VERBOSE:
    cpu_kernel = _reported(cpu_kernel)


def _of_half(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of depthwise_conv2d from one that takes separable_conv2d's arguments."""

    def half_kernel(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Any:
        return kernel(input, weight, None, bias, None, None, *geometry, "identity")

    return half_kernel


def _depthwise_vmap_rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    input, weight, bias = in_dims[:3]
    return cast(
        "tuple[Tensor, int]", _of_half(partial(_vmap_rule, info, (input, weight, None, bias, None)))(*args)
    )


def implement(kernel: Callable[..., Tensor], key: str) -> None:
    """Gives both operators a kernel that takes separable_conv2d's arguments."""
    library.impl("separable_conv2d", kernel, key)
    library.impl("depthwise_conv2d", _of_half(kernel), key)


def _from_dispatcher(*args: Any) -> Tensor:
    """The kernel for tensors that nobody has looked at."""
    _native.require_memory((*tensor_names(args[2]), "packed"), *args[:6])
    return cpu_kernel(*args)


implement(_from_dispatcher, "CPU")
implement(composed_kernel, "CompositeExplicitAutograd")
_library.register_fake("fastsep::separable_conv2d", _fake_kernel, lib=library)
_library.register_fake("fastsep::depthwise_conv2d", _of_half(_fake_kernel), lib=library)
_library.register_vmap("fastsep::separable_conv2d", _vmap_rule, lib=library)
_library.register_vmap("fastsep::depthwise_conv2d", _depthwise_vmap_rule, lib=library)
register_flop_formula(torch.ops.fastsep.separable_conv2d)(_flops)
register_flop_formula(torch.ops.fastsep.depthwise_conv2d)(_depthwise_flops)


def call(*args: Any) -> Tensor:
    """The operator that takes these arguments, by way of the dispatcher."""
    if args[2] is None:
        return depthwise_op(*args[:2], args[3], *args[6:10])
    return op(*args)


# For tensors of a GPU; _cuda_kernels.py puts its own in this place.
cuda_kernel: Callable[..., Tensor] = composed_kernel


def past_dispatcher(input: Any, *weights: Tensor | None) -> bool:
    """Whether the kernel for the input's device may be called by itself, which saves 7 us.

    Not where a compiler, a transform, a mode or the profiler watches what runs, nor for tensors that are not
    stored.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    return _native.stored(input, *weights) != 0


def run_past_dispatcher(*args: Any) -> Tensor:
    """The kernel for the input's device."""
    return cpu_kernel(*args) if args[0].is_cpu else cuda_kernel(*args)


def run(*args: Any) -> Tensor:
    """The operator that takes these arguments, below autograd."""
    if past_dispatcher(*args[:6]):
        return run_past_dispatcher(*args)
    with below_autograd():
        return call(*args)
