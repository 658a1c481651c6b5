"""The gradients as operators of their own, separable_conv2d_backward and depthwise_conv2d_backward.

Of the forward pass they need the input alone; the rest is computed again, tile by tile. As in _ops.py, the
second is the first without a pointwise_weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import _native, _ops
from ._activations import ACTIVATIONS
from ._ops import Ints, address, below_autograd, check_types, dense_weights, library, tensor_names

convolution_backward = torch.ops.aten.convolution_backward

_library: Any = torch.library  # Any, for its functions have no types
library.define(
    "separable_conv2d_backward(Tensor grad, Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, "
    "Tensor? depthwise_bias, Tensor? bias, Tensor? saved, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, str mid_activation, str activation, bool[5] needed) -> Tensor[]"
)
library.define(
    "depthwise_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
    "SymInt[4] padding, SymInt[2] dilation, str activation, bool[3] needed) -> Tensor[]"
)
op: Callable[..., list[Tensor]] = torch.ops.fastsep.separable_conv2d_backward.default
depthwise_op: Callable[..., list[Tensor]] = torch.ops.fastsep.depthwise_conv2d_backward.default


def wants_output(input: Tensor, activation: str) -> bool:
    """Whether the native backward pass can do without the pointwise half if it is given the output."""
    if activation == "identity":
        return False
    module = _native.serving(input)
    return module is not None and module.derivative_from_output(ACTIVATIONS[activation].code)


def compose(
    grad: Tensor,
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
    needed: Sequence[bool],
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
    inner, groups = depthwise_weight.shape[0], input.shape[1]
    stride, dilation = list(stride), list(dilation)

    t = F.conv2d(x, depthwise_weight, depthwise_bias, stride, pads, dilation, groups)
    grad_u, grad_pw, grad_b = grad, None, None
    if pointwise_weight is not None:
        u = ACTIVATIONS[mid_activation].forward(t)
        if activation != "identity":
            grad = ACTIVATIONS[activation].backward(grad, F.conv2d(u, pointwise_weight, bias))
        grad_u, grad_pw, grad_b = convolution_backward(
            *(
                grad,
                u,
                pointwise_weight,
                [pointwise_weight.shape[0]],
                [1, 1],
                [0, 0],
                [1, 1],
                False,
                [0, 0],
                1,
            ),
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


def check_grad(name: str, grad: Tensor, input: Tensor, shape: Sequence[int]) -> None:
    """RuntimeError for a gradient, or an output, that is not one of this call."""
    if tuple(grad.shape) != tuple(shape):
        raise RuntimeError(f"{name} must be {list(shape)}, the output's shape, got {list(grad.shape)}")
    if grad.dtype != input.dtype:
        raise RuntimeError(f"{name} must have the input's dtype, {input.dtype}, got {grad.dtype}")
    if grad.device != input.device:
        raise RuntimeError(f"{name} must be on the input's device, {input.device}, got {grad.device}")


def check_needed(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
    """RuntimeError where a gradient is asked for of a bias that is not there."""
    for name, tensor, need in zip(tensor_names(tensors[2]), tensors, needed, strict=True):
        if need and tensor is None:
            raise RuntimeError(f"needed must be False for the {name}, which is None, got {list(needed)}")


def check_gradients(
    grad: Tensor, tensors: Sequence[Any], saved: Tensor | None, shape: Sequence[int], needed: Sequence[bool]
) -> None:
    check_needed(tensors, needed)
    check_grad("grad", grad, tensors[0], shape)
    if saved is not None:
        check_grad("saved", saved, tensors[0], shape)


def empty_gradients(
    tensors: Sequence[Tensor | None],
    layout: torch.memory_format,
    needed: Sequence[bool],
    *,
    zeros: bool = False,
) -> list[Tensor]:
    """Room for those that are needed: of the input in its format, of weights row-major."""
    formats = [layout] + [torch.contiguous_format] * 4
    made = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=format)
        for x, format, need in zip(tensors, formats, needed, strict=True)
        if need and x is not None
    ]
    return [gradient.zero_() for gradient in made] if zeros else made


# The kernels. The arguments are the gradient of the output, the five tensors, the output where it was saved,
# the rest of separable_conv2d's, and which of the five gradients are needed; those come back in this order.


def cpu_kernel(
    grad: Tensor,
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor | None,
    depthwise_bias: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    core, dtype = _native.core, input.dtype
    tensors = input, depthwise_weight, pointwise_weight, depthwise_bias, bias
    if core is None or dtype not in _native.DTYPES:
        return composed_kernel(grad, *tensors, saved, *rest)
    *geometry, needed = rest
    problem, shape, layout = _ops.native_problem(*tensors, *geometry)
    check_gradients(grad, tensors, saved, shape, needed)
    wanted = empty_gradients(tensors, layout, needed, zeros=shape[0] == 0)
    if shape[0] == 0 or not wanted:
        return wanted
    room = iter(wanted)
    gradients = [next(room) if need else None for need in needed]
    if _native.own_pool:
        core.set_num_threads(torch.get_num_threads())
    # Named, so that a dense copy lives until the call is over.
    input, grad = input.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    dw, db, pw, b = dense_weights(depthwise_weight, depthwise_bias, pointwise_weight, bias)
    weights = address(dw), address(db), address(pw)
    if problem[-1] != 0:
        if saved is None:
            forward = problem if core.derivative_from_output(problem[-1]) else (*problem[:-1], 0)
            saved = torch.empty(shape, dtype=dtype, device=_native.CPU, memory_format=layout)
            core.forward(forward, "", input.data_ptr(), *weights, address(b), saved.data_ptr())
        else:
            saved = saved.contiguous(memory_format=layout)
    grad_x, grad_dw, grad_pw, grad_db, grad_b = (address(gradient) for gradient in gradients)
    core.backward(
        *(problem, "", input.data_ptr(), *weights, address(saved), grad.data_ptr()),
        *(grad_x, grad_dw, grad_db, grad_pw, grad_b),
    )
    return wanted


def composed_kernel(grad: Tensor, *args: Any) -> list[Tensor]:
    tensors, geometry, needed = args[:5], args[6:-1], args[-1]
    check(grad, *args)
    given: Any = (grad, *tensors, *geometry, needed)
    with torch.no_grad():  # where they need not be differentiable, some activations' gradients are simpler
        gradients = compose(*given)
    formats = [_ops.memory_format(tensors[0])] + [torch.contiguous_format] * 4
    return [
        gradient.contiguous(memory_format=format)
        for gradient, format, need in zip(gradients, formats, needed, strict=True)
        if need and gradient is not None
    ]


def check(grad: Tensor, *args: Any) -> None:
    """RuntimeError that names an argument which does not fit the others."""
    tensors, saved, geometry, needed = args[:5], args[5], args[6:-1], args[-1]
    shape = _ops.output_shape(*tensors, *geometry[:3])
    check_types(*tensors)
    check_gradients(grad, tensors, saved, shape, needed)


def _fake_kernel(grad: Tensor, *args: Any) -> list[Tensor]:
    check(grad, *args)
    tensors = args[:5]
    return empty_gradients(tensors, _ops.memory_format(tensors[0]), args[-1])


def _autograd_kernel(grad: Tensor, *args: Any) -> list[Tensor]:
    """For tensors that autograd watches: the gradients can be differentiated again."""
    tensors, geometry, needed = args[:5], args[6:-1], args[-1]
    watched = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (grad, *args[:6]))
    if watched or forward_ad._current_level >= 0:
        check(grad, *args)
        given: Any = (grad, *tensors, *geometry, needed)
        return [gradient for gradient in compose(*given) if gradient is not None]
    with below_autograd():
        return call(grad, *args)


def _vmap_rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    """A call for each of the batch."""
    tensors = list(zip(args[:7], in_dims[:7], strict=True))
    if info.batch_size == 0:
        one = [x if dim is None else x.new_zeros(x.movedim(dim, 0).shape[1:]) for x, dim in tensors]
        gradients = [x.new_empty(0, *x.shape) for x in call(*one, *args[7:])]
        return gradients, [0] * len(gradients)
    calls = [
        call(*(x if dim is None else x.select(dim, i) for x, dim in tensors), *args[7:])
        for i in range(info.batch_size)
    ]
    gradients = [torch.stack(parts) for parts in zip(*calls, strict=True)]
    return gradients, [0] * len(gradients)


def _flops(
    grad: Ints,
    _input: Ints,
    depthwise_weight: Ints,
    pointwise_weight: Ints | None,
    _depthwise_bias: Any,
    _bias: Any,
    saved: Any,
    *rest: Any,
    out_shape: Any,
) -> int:
    """Each gradient of a half's input or weight takes the operations of that half, as do t and v again."""
    mid_activation, activation, (need_x, need_dw, need_pw, need_db, _) = rest[-3:]
    inner, _one, kh, kw = depthwise_weight
    n, k, oh, ow = grad
    depthwise = 2 * n * oh * ow * inner * kh * kw
    pointwise = 0 if pointwise_weight is None else 2 * n * oh * ow * inner * k
    need_u = need_x or need_dw or need_db
    again_v = activation != "identity" and saved is None
    again_t = again_v or need_pw or (need_u and mid_activation != "identity")
    total: int = depthwise * (again_t + need_x + need_dw) + pointwise * (again_v + need_u + need_pw)
    return total


def _of_half(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of depthwise_conv2d_backward from one that takes separable_conv2d_backward's arguments."""

    def half_kernel(grad: Any, input: Any, weight: Any, bias: Any, *rest: Any, **keywords: Any) -> Any:
        *geometry, (need_x, need_w, need_b) = rest
        needed = need_x, need_w, False, need_b, False
        return kernel(grad, input, weight, None, bias, None, None, *geometry, "identity", needed, **keywords)

    return half_kernel


def _depthwise_vmap_rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    grad, input, weight, bias = in_dims[:4]
    return _of_half(partial(_vmap_rule, info, (grad, input, weight, None, bias, None, None)))(*args)


# For tensors of a GPU; _cuda_kernels.py puts its own in this place.
cuda_kernel: Callable[..., list[Tensor]] = composed_kernel


def call(*args: Any) -> list[Tensor]:
    """The operator that takes these arguments, by way of the dispatcher."""
    if args[3] is None:
        need_x, need_w, _, need_b, _ = args[-1]
        return depthwise_op(*args[:3], args[4], *args[7:11], (need_x, need_w, need_b))
    return op(*args)


def run(*args: Any) -> list[Tensor]:
    """The operator that takes these arguments."""
    if not _ops.past_dispatcher(*args[:7]):
        return call(*args)
    return cpu_kernel(*args) if args[0].is_cpu else cuda_kernel(*args)


def _reported(kernel: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def reported_kernel(grad: Tensor, *args: Any) -> list[Tensor]:
        begin = time.perf_counter()
        gradients = kernel(grad, *args)
        tensors, geometry, needed = args[:5], args[6:-1], args[-1]
        names = [name for name, need in zip(tensor_names(args[2]), needed, strict=True) if need]
        path = _ops.path_of(grad.dtype, f"gradients of {', '.join(names)}")
        _ops.report(f"backward {path}", begin, tensors, geometry)
        return gradients

    return reported_kernel


if _ops.VERBOSE:
    cpu_kernel = _reported(cpu_kernel)


def implement(kernel: Callable[..., list[Tensor]], key: str) -> None:
    """Gives both operators a kernel that takes separable_conv2d_backward's arguments."""
    library.impl("separable_conv2d_backward", kernel, key)
    library.impl("depthwise_conv2d_backward", _of_half(kernel), key)


def _from_dispatcher(grad: Tensor, *args: Any) -> list[Tensor]:
    """The kernel for tensors that nobody has looked at."""
    _native.require_memory(("grad", *tensor_names(args[2]), "saved"), grad, *args[:6])
    return cpu_kernel(grad, *args)


implement(_from_dispatcher, "CPU")
implement(composed_kernel, "CompositeExplicitAutograd")
implement(_autograd_kernel, "Autograd")
_library.register_fake("fastsep::separable_conv2d_backward", _fake_kernel, lib=library)
_library.register_fake("fastsep::depthwise_conv2d_backward", _of_half(_fake_kernel), lib=library)
_library.register_vmap("fastsep::separable_conv2d_backward", _vmap_rule, lib=library)
_library.register_vmap("fastsep::depthwise_conv2d_backward", _depthwise_vmap_rule, lib=library)
register_flop_formula(torch.ops.fastsep.separable_conv2d_backward)(_flops)
register_flop_formula(torch.ops.fastsep.depthwise_conv2d_backward)(_of_half(_flops))
