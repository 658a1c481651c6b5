"""separable_conv2d and depthwise_conv2d: what the arguments mean, and which path computes them."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from . import _native, _ops
from ._activations import activation_name
from ._autograd import apply
from ._native import PLAIN

Pair = tuple[int, int]
Pads = tuple[int, int, int, int]  # top, bottom, left, right
Size = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[Sequence[int]]


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
    """A depthwise k x k convolution and the pointwise 1 x 1 convolution behind it, in one pass.

    y = activation(pointwise(mid_activation(depthwise(input) + depthwise_bias)) + bias)

    >>> x = torch.randn(8, 32, 112, 112)
    >>> y = separable_conv2d(x, torch.randn(32, 1, 3, 3), torch.randn(64, 32, 1, 1), stride=2, padding="same")
    >>> y.shape
    torch.Size([8, 64, 56, 56])

    input: [N, C, H, W] or [C, H, W]. The result, [N, K, OH, OW] or [K, OH, OW], has the input's format.
    depthwise_weight: [C*m, 1, kernel_h, kernel_w], m filters for each channel, channel c's from c*m on.
    pointwise_weight: [K, C*m, 1, 1].
    bias, depthwise_bias: [K], [C*m].
    stride, dilation: of the depthwise convolution; an int or (height, width).
    padding: zeros around the input; an int, (height, width), ((top, bottom), (left, right)), "valid" for
        none, or "same" for an output of ceil(size / stride), the larger half of an odd number at the end.
    mid_activation, activation: None, "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "hardswish",
        "hardsigmoid", "sigmoid", "tanh", "gelu" (by erf) or "gelu_tanh".

    RuntimeError for tensors that do not fit together, sizes out of range and an unknown padding word,
    ValueError for an unknown activation, TypeError for an argument of the wrong type.

    L. Sifre, "Rigid-motion scattering for image classification" (2014); F. Chollet, "Xception"
    (arXiv:1610.02357); A. Howard et al., "MobileNets" (arXiv:1704.04861).
    """
    tensors = (input, depthwise_weight, pointwise_weight, depthwise_bias, bias)
    if has_torch_function(tensors):
        return handle_torch_function(
            separable_conv2d,
            tensors,
            *(input, depthwise_weight, pointwise_weight, bias, stride, padding, dilation),
            depthwise_bias=depthwise_bias,
            mid_activation=mid_activation,
            activation=activation,
        )
    if pointwise_weight is None:
        raise TypeError("pointwise_weight must be a Tensor, got None")
    geometry = parse_geometry(input, depthwise_weight, stride, padding, dilation)
    mid, last = activation_name(mid_activation, "mid_activation"), activation_name(activation, "activation")
    return dispatch(*tensors, None, *geometry, mid, last)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """A depthwise convolution, where each channel has filters of its own, and an activation behind it.

    y = activation(depthwise(input) + bias)

    >>> x = torch.randn(8, 32, 112, 112)
    >>> depthwise_conv2d(x, torch.randn(32, 1, 3, 3), stride=2, padding="same", activation="relu").shape
    torch.Size([8, 32, 56, 56])

    input: [N, C, H, W] or [C, H, W]. The result, [N, C*m, OH, OW] or [C*m, OH, OW], has the input's format.
    weight: [C*m, 1, kernel_h, kernel_w], m filters for each channel, channel c's from c*m on.
    bias: [C*m].
    stride, padding, dilation, activation: as in separable_conv2d.

    Errors and source are those of separable_conv2d.
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            depthwise_conv2d,
            (input, weight, bias),
            *(input, weight, bias, stride, padding, dilation),
            activation=activation,
        )
    geometry = parse_geometry(input, weight, stride, padding, dilation)
    mid = activation_name(activation, "activation")
    return dispatch(input, weight, None, bias, None, None, *geometry, mid, "identity")


def dispatch(*args: Any) -> Tensor:
    """The operator of these arguments (see _ops.py), [C, H, W] inputs too, by the path that serves them."""
    tensors = input, depthwise_weight, pointwise_weight, depthwise_bias, bias = args[:5]
    direct = depthwise_weight is not None and _ops.past_dispatcher(*tensors)
    reason = (not direct and why_no_kernel(*tensors)) or why_not_now(input)
    if input.dim() == 3:
        return dispatch(input.unsqueeze(0), *args[1:]).squeeze(0)
    if reason:
        return composition(reason, tensors, args[6:])
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():  # what reads the file does not know the operators
            return composition("torch.onnx.export", tensors, args[6:])
        return _ops.call(*_autocast(args) if input.is_cuda else args)
    if input.is_cuda:
        args = _autocast(args)
        input, depthwise_weight, pointwise_weight, depthwise_bias, bias = args[:5]
    # What the operator's autograd kernel would do, without the way through the dispatcher.
    if torch._C._are_functorch_transforms_active() or (
        torch.is_grad_enabled()
        and (
            input.requires_grad
            or depthwise_weight.requires_grad
            or (pointwise_weight is not None and pointwise_weight.requires_grad)
            or (depthwise_bias is not None and depthwise_bias.requires_grad)
            or (bias is not None and bias.requires_grad)
        )
    ):
        return apply(*args)
    return _ops.run_past_dispatcher(*args) if direct else _ops.run(*args)


def _autocast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments as autocast gives them to torch's convolutions: float64 stays what it is."""
    if not torch.is_autocast_enabled("cuda"):
        return args
    dtype = torch.get_autocast_dtype("cuda")
    return *(x if x is None or x.dtype is torch.float64 else x.to(dtype) for x in args[:5]), *args[5:]


def why_composed(*tensors: Any) -> str:
    """Why torch's operators have to do the work; empty where the native kernels can."""
    return why_no_kernel(*tensors) or why_not_now(tensors[0])


def why_no_kernel(*tensors: Any) -> str:
    """Why native code cannot have these tensors; empty where it can."""
    input = tensors[0]
    if isinstance(input, Tensor) and (input.is_nested or input.layout in _SPARSE):
        kind = "nested" if input.is_nested else str(input.layout)
        raise RuntimeError(f"input must be a dense tensor, got a {kind} one")
    if any(type(tensor) not in PLAIN for tensor in tensors) and (reason := _subclass(*tensors)):
        return reason
    device = input.device.type
    if device not in ("cpu", "cuda"):
        return f"no native kernel for {device}"
    if any(x is not None and (x.device.type != device or x.layout is not torch.strided) for x in tensors):
        return "no native kernel for tensors that are not dense in memory"
    return ""


_SPARSE = torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc


def why_not_now(input: Tensor) -> str:
    """Why native code cannot serve this dtype in what torch is doing; empty where it can."""
    dtype = input.dtype
    if input.is_cuda:
        if _native.cuda is None:
            return f"no native kernel for cuda: {_native.cuda_missing}"
        if dtype not in _native.CUDA_DTYPES:
            return f"no native kernel for {dtype} on cuda"
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            if dtype not in _native.CUDA_DTYPES:
                return f"autocast to {dtype}"
    else:
        if _native.core is None:
            return f"native module missing: {_native.missing}"
        if dtype is not torch.float32 and dtype is not torch.float64:
            return f"no native kernel for {dtype}"
        if torch.is_autocast_enabled("cpu"):
            return "autocast"
    if forward_ad._current_level >= 0:
        return "forward-mode derivative"
    if torch._C._are_functorch_transforms_active() and _functionalizes():
        return "torch.func.functionalize"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return ""


def _functionalizes() -> bool:
    """Whether one of torch.func's transforms is the one that knows no autograd.Function."""
    functorch: Any = torch._C._functorch
    if torch.compiler.is_compiling():  # which knows the transforms that it meets, and this function not
        return False
    stack = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Functionalize for level in stack)


def _subclass(*tensors: Tensor | None) -> str:
    for i, (name, tensor) in enumerate(zip(_ops.tensor_names(tensors[2]), tensors, strict=True)):
        if type(tensor) in PLAIN or (tensor is None and i > 1):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        # The stand-ins that torch.export traces with do want to see the operator.
        if type(tensor).__name__ not in ("FakeTensor", "FunctionalTensor"):
            return f"tensor subclass {type(tensor).__name__}"
    return ""


def composition(reason: str, tensors: tuple[Any, ...], geometry: tuple[Any, ...]) -> Tensor:
    """The operator by torch's convolutions and activations."""
    if torch._C._get_tracing_state() is not None:  # which has numbers of its own for shapes
        return _ops.compose(*tensors, *geometry)
    begin = time.perf_counter() if _ops.VERBOSE else 0.0
    _ops.output_shape(*tensors, *geometry[:3])
    input, device = tensors[0], tensors[0].device.type
    # Autocast unites the dtypes itself.
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        _ops.check_types(*tensors)
    y = _ops.compose(*tensors, *geometry)
    # torch also heeds the weights' format. (Inside torch.func.vmap formats cannot be asked for.)
    if type(y) is Tensor and y.layout is torch.strided and not torch._C._are_functorch_transforms_active():
        y = y.contiguous(memory_format=_ops.memory_format(input))
        if _ops.VERBOSE and not torch.compiler.is_compiling():
            _ops.report(f"composition | {reason}", begin, tensors, geometry)
    return y


def parse_pair(value: Size, name: str) -> Pair:
    """(height, width) of an int or a pair of ints."""
    if type(value) is tuple and len(value) == 2 and all(map(_is_symbol, value)):
        return value[0], value[1]
    try:
        if isinstance(value, Sequence) and not isinstance(value, str):
            first, second = value
            return operator.index(first), operator.index(second)
        both = operator.index(value)
        return both, both
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}") from None


def _is_symbol(value: Any) -> bool:
    """For numbers, also those that a compiler, an exporter or torch.jit.trace computes from sizes."""
    if type(value) is int:
        return True
    traced = isinstance(value, Tensor) and torch._C._get_tracing_state() is not None
    return traced or isinstance(value, torch.SymInt)


def parse_geometry(
    input: Tensor, depthwise_weight: Tensor, stride: Size, padding: Padding, dilation: Size
) -> tuple[Pair, Pads, Pair]:
    """Stride, padding and dilation as the operators want them."""
    pads = parse_padding(padding)
    steps, dilations = parse_pair(stride, "stride"), parse_pair(dilation, "dilation")
    if isinstance(pads, str):
        rows, columns = depthwise_weight.shape[2:] if depthwise_weight.dim() == 4 else (1, 1)
        pads = same_padding(input, (rows, columns), steps, dilations)
    return steps, pads, dilations


def parse_padding(value: Padding, error: type[Exception] = RuntimeError) -> Pads | str:
    """(top, bottom, left, right), or "same", which depends on the input; `error` for another word."""
    if isinstance(value, str):
        if value == "valid":
            return 0, 0, 0, 0
        if value == "same":
            return value
        raise error(f'padding must be "valid" or "same" where it is a word, got {value!r}')
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value[0], value[0], value[1], value[1]
    try:
        rows, columns = cast("tuple[Size, Size]", value if isinstance(value, Sequence) else (value, value))
        (top, bottom), (left, right) = parse_pair(rows, "padding"), parse_pair(columns, "padding")
        return top, bottom, left, right
    except (TypeError, ValueError):
        raise TypeError(
            'padding must be an int, a pair of ints, ((top, bottom), (left, right)), "valid" or "same", '
            f"got {value!r}"
        ) from None


def same_padding(input: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Pads:
    """The padding for an output of ceil(size / stride), the odd pixel at the end, as TensorFlow has it.

    Sizes may be symbols of a compiler or exporter, so nothing is asked of them.
    """
    if isinstance(input, Tensor) and input.dim() < 2:
        return 0, 0, 0, 0  # the checks of the shapes will say what is wrong
    larger: Any = torch.sym_max  # Any, for it has no types
    pads = []
    for size, k, s, d in zip((input.shape[-2], input.shape[-1]), kernel, stride, dilation, strict=True):
        # (ceil(size / s) - 1) * s + reach + 1 - size, where that is more than nothing
        reach = d * (k - 1)
        total = reach if s == 1 else reach - (size - 1) % s
        if reach < s - 1:
            total = total.clamp(min=0) if isinstance(total, Tensor) else larger(total, 0)
        pads += [total // 2, total - total // 2]
    return pads[0], pads[1], pads[2], pads[3]
