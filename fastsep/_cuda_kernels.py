"""The operators on tensors of a GPU: what is queued there for each path that fastsep/_plan.py may choose.

Everything goes to the current stream of the tensors' device, and memory comes from torch's allocator. Nothing
waits for the device, but where FASTSEP_VERBOSE or torch.backends.cudnn.benchmark asks for times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backward, _native, _ops, _plan
from ._activations import ACTIVATIONS, IN_PLACE
from ._ops import address, dense_weights
from ._plan import BACKWARD, DEPTHWISE, FORWARD, FUSED, HOPPER, TORCH, Problem

T = TypeVar("T")
Weight = Tensor | None
Five = tuple[Tensor, Tensor, Weight, Weight, Weight]  # input, weights and biases, in the operator's order

# Activations of which the slope at v is the same as at their value.
_SAME_SLOPE_AT_OUTPUT = ("identity", "relu", "relu6", "leaky_relu")


def allows_tf32() -> bool:
    """Whether torch's convolutions of float32 may be rounded to TF32."""
    cudnn: Any = torch.backends.cudnn
    try:
        return bool(cudnn.allow_tf32)
    except RuntimeError:  # convolutions and recurrent networks were told different things, by the newer names
        return bool(cudnn.conv.fp32_precision == "tf32")


def stream_of(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def workspace_of(size: int, device: torch.device) -> Tensor | None:
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


def half_of(problem: Problem) -> Problem:
    """The depthwise half alone."""
    return (*problem[:4], 0, *problem[5:19], 0)


def compose_in_place(tensors: Five, geometry: tuple[Any, ...]) -> Tensor:
    """As compose(), for tensors that nobody watches: activations overwrite the convolutions' results."""
    input, depthwise_weight, pointwise_weight, depthwise_bias, bias = tensors
    *sizes, mid_activation, activation = geometry
    half: Any = depthwise_weight, None, depthwise_bias, None, *sizes, "identity", "identity"
    u = activate(_ops.compose(input, *half), mid_activation)
    return u if pointwise_weight is None else activate(F.conv2d(u, pointwise_weight, bias), activation)


def activate(x: Tensor, activation: str) -> Tensor:
    return IN_PLACE.get(activation, ACTIVATIONS[activation].forward)(x)


# The native kernels.


def native_forward(
    tensors: Five,
    problem: Problem,
    shape: Sequence[int],
    format: torch.memory_format,
    tf32: bool,
    path: str = FUSED,
) -> Tensor:
    cuda: Any = _native.cuda
    forward = cuda.forward_hopper if path == HOPPER else cuda.forward
    input, device = tensors[0].contiguous(memory_format=format), tensors[0].device
    output = torch.empty(shape, dtype=input.dtype, device=device, memory_format=format)
    # Named, so that a dense copy lives until all is queued.
    dw, pw, db, b = dense_weights(*tensors[1:])
    size = cuda.forward_workspace_bytes(problem, tf32)
    workspace = workspace_of(size, device)
    forward(
        *(problem, tf32, input.data_ptr(), address(dw), address(db), address(pw), address(b)),
        *(output.data_ptr(), address(workspace), size, device.index, stream_of(device)),
    )
    return output


def native_backward(
    grad: Tensor,
    tensors: Five,
    saved: Weight,
    gradients: Sequence[Weight],
    problem: Problem,
    format: torch.memory_format,
    tf32: bool,
) -> None:
    """Fills the gradients that are there."""
    cuda: Any = _native.cuda
    device = grad.device
    input, grad = tensors[0].contiguous(memory_format=format), grad.contiguous(memory_format=format)
    saved = None if saved is None else saved.contiguous(memory_format=format)
    dw, pw, db = dense_weights(*tensors[1:4])
    grad_x, grad_dw, grad_pw, grad_db, grad_b = (address(gradient) for gradient in gradients)
    asked = grad_x, grad_dw, grad_db, grad_pw, grad_b
    size = cuda.backward_workspace_bytes(problem, tf32, *asked)
    workspace = workspace_of(size, device)
    cuda.backward(
        *(problem, tf32, input.data_ptr(), address(dw), address(db), address(pw), address(saved)),
        *(grad.data_ptr(), *asked, address(workspace), size, device.index, stream_of(device)),
    )


# The operators, with the arguments of those for the CPU.


def forward_kernel(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Weight,
    depthwise_bias: Weight,
    bias: Weight,
    packed: Weight,
    *geometry: Any,
) -> Tensor:
    tensors: Five = input, depthwise_weight, pointwise_weight, depthwise_bias, bias
    if reason := why_not(tensors):
        return reported(lambda: _ops.composed_kernel(*tensors, packed, *geometry), reason, tensors, geometry)
    problem, shape, format = _ops.native_problem(*tensors, *geometry)
    if reason := refusal(problem):
        return reported(lambda: _ops.composed_kernel(*tensors, packed, *geometry), reason, tensors, geometry)
    if shape[0] == 0:
        return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=format)
    tf32 = input.dtype is torch.float32 and allows_tf32()
    paths: dict[str, Callable[[], Tensor]]
    if pointwise_weight is None:
        paths = {DEPTHWISE: partial(native_forward, tensors, problem, shape, format, tf32)}
    else:
        paths = {
            FUSED: partial(native_forward, tensors, problem, shape, format, tf32),
            DEPTHWISE: partial(_depthwise_then_torch, tensors, problem, shape, format, tf32, geometry[-1]),
        }
        if has_hopper_path(problem, tf32, input.device.index):
            paths[HOPPER] = partial(native_forward, tensors, problem, shape, format, tf32, HOPPER)
    paths[TORCH] = lambda: compose_in_place(tensors, geometry).contiguous(memory_format=format)
    variant = depthwise_bias is not None, bias is not None
    choice = _plan.choose(problem, FORWARD, tf32, variant, input.device.index, paths)
    return reported(paths[choice.path], choice, tensors, geometry)


def has_hopper_path(problem: Problem, tf32: bool, device: int) -> bool:
    cuda: Any = _native.cuda
    return _plan.admitted(problem, FORWARD, HOPPER, tf32, device) and cuda.has_hopper_kernel(problem, device)


def _depthwise_then_torch(
    tensors: Five,
    problem: Problem,
    shape: Sequence[int],
    format: torch.memory_format,
    tf32: bool,
    activation: str,
) -> Tensor:
    _, _, pointwise_weight, _, bias = tensors
    assert pointwise_weight is not None
    u = _native_half(tensors, problem, shape, format, tf32)
    return activate(F.conv2d(u, pointwise_weight, bias), activation).contiguous(memory_format=format)


def _native_half(
    tensors: Five, problem: Problem, shape: Sequence[int], format: torch.memory_format, tf32: bool
) -> Tensor:
    """The depthwise half, for the shape of the whole's result."""
    input, depthwise_weight, _, depthwise_bias, _ = tensors
    half: Five = input, depthwise_weight, None, depthwise_bias, None
    sizes = shape[0], depthwise_weight.shape[0], shape[2], shape[3]
    return native_forward(half, half_of(problem), sizes, format, tf32)


def backward_kernel(
    grad: Tensor,
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Weight,
    depthwise_bias: Weight,
    bias: Weight,
    saved: Weight,
    *rest: Any,
) -> list[Tensor]:
    tensors: Five = input, depthwise_weight, pointwise_weight, depthwise_bias, bias
    *geometry, needed = rest
    names = [name for name, need in zip(_ops.tensor_names(pointwise_weight), needed, strict=True) if need]
    what = f"gradients of {', '.join(names)}"
    run = partial(_backward.composed_kernel, grad, *tensors, saved, *rest)
    if reason := why_not(tensors):
        return reported(run, reason, tensors, tuple(geometry), what)
    problem, shape, format = _ops.native_problem(*tensors, *geometry)
    if reason := refusal(problem):
        return reported(run, reason, tensors, tuple(geometry), what)
    _backward.check_gradients(grad, tensors, saved, shape, needed)
    if shape[0] == 0 or not any(needed):
        return _backward.empty_gradients(tensors, format, needed, zeros=True)
    tf32 = input.dtype is torch.float32 and allows_tf32()
    given = grad, tensors, saved, problem, shape, format, tf32, needed
    paths: dict[str, Callable[[], list[Tensor]]] = {FUSED: partial(_fused_backward, *given)}
    if pointwise_weight is None:
        paths = {DEPTHWISE: paths[FUSED]}
    else:
        paths[DEPTHWISE] = partial(_depthwise_backward, *given, geometry[-1])
    paths[TORCH] = run
    variant = *needed, depthwise_bias is not None, bias is not None, saved is not None
    choice = _plan.choose(problem, BACKWARD, tf32, variant, input.device.index, paths)
    return reported(paths[choice.path], choice, tensors, tuple(geometry), what)


def _fused_backward(
    grad: Tensor,
    tensors: Five,
    saved: Weight,
    problem: Problem,
    shape: Sequence[int],
    format: torch.memory_format,
    tf32: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    cuda: Any = _native.cuda
    if problem[-1] != 0 and saved is None:
        # The value where its slope can be had from that, else what goes into the activation.
        kept = problem if cuda.derivative_from_output(problem[-1]) else (*problem[:-1], 0)
        saved = native_forward(tensors, kept, shape, format, tf32)
    wanted = _backward.empty_gradients(tensors, format, needed)
    room = iter(wanted)
    gradients = [next(room) if need else None for need in needed]
    native_backward(grad, tensors, saved, gradients, problem, format, tf32)
    return wanted


def _depthwise_backward(
    grad: Tensor,
    tensors: Five,
    saved: Weight,
    problem: Problem,
    shape: Sequence[int],
    format: torch.memory_format,
    tf32: bool,
    needed: Sequence[bool],
    activation: str,
) -> list[Tensor]:
    """The pointwise half's gradients by torch, from a depthwise output that is computed again."""
    input, depthwise_weight, pointwise_weight, depthwise_bias, bias = tensors
    assert pointwise_weight is not None
    need_x, need_dw, need_pw, need_db, need_b = needed
    need_u = need_x or need_dw or need_db
    at = saved if activation in _SAME_SLOPE_AT_OUTPUT else None
    need_v = activation != "identity" and at is None
    u = grad.new_empty(shape[0], depthwise_weight.shape[0], *shape[2:]) if not (need_pw or need_v) else None
    if u is None:
        u = _native_half(tensors, problem, shape, format, tf32)
    if activation != "identity":
        grad = ACTIVATIONS[activation].backward(
            grad, F.conv2d(u, pointwise_weight, bias) if at is None else at
        )
    grad_u, grad_pw, grad_b = _backward.convolution_backward(
        *(grad, u, pointwise_weight, [shape[1]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        [need_u, need_pw, need_b],
    )
    half: Five = input, depthwise_weight, None, depthwise_bias, None
    own = _backward.empty_gradients(half, format, (need_x, need_dw, False, need_db, False))
    room = iter(own)
    grad_x, grad_dw, grad_db = (next(room) if need else None for need in (need_x, need_dw, need_db))
    if need_u:
        gradients = grad_x, grad_dw, None, grad_db, None
        native_backward(grad_u, half, None, gradients, half_of(problem), format, tf32)
    grad_pw = grad_pw.contiguous() if need_pw else None
    made = grad_x, grad_dw, grad_pw, grad_db, grad_b
    return [gradient for gradient, need in zip(made, needed, strict=True) if need and gradient is not None]


def why_not(tensors: Five) -> str:
    """Why no native kernel can have these tensors; RuntimeError for tensors of different devices."""
    input = tensors[0]
    device = input.device
    if any(x is not None and x.device != device for x in tensors[1:]):
        _ops.check_types(*tensors)
    if input.dtype not in _native.CUDA_DTYPES:
        return f"no native kernel for {input.dtype} on cuda"
    return _native.why_not_on(device.index)


def refusal(problem: Problem) -> str:
    """Why the native kernels do not take this problem, which torch's may."""
    cuda: Any = _native.cuda
    reason: str = cuda.why_refused(problem)
    return reason


def reported(
    run: Callable[[], T], why: str | _plan.Choice, tensors: Five, geometry: tuple[Any, ...], what: str = ""
) -> T:
    """Runs it, with FASTSEP_VERBOSE between two events; the line says what the device took."""
    if not _ops.VERBOSE:
        return run()
    path, reason = ("composition", why) if isinstance(why, str) else (f"cuda {why.path}", why.why)
    path = f"{'backward ' if what else ''}{path} | {reason}{f', {what}' if what else ''}"
    if torch.cuda.is_current_stream_capturing():
        result, took = run(), "not timed in a graph"
    else:
        results: list[T] = []
        with torch.cuda.device(tensors[0].device):
            seconds = _plan.Stopwatch()(lambda: results.append(run()), 1)
        result, took = results[0], f"{seconds * 1e3:.3f} ms on the device, waited for"
    _ops.report(path, 0.0, tensors, geometry, took=took)
    return result


_ops.implement(forward_kernel, "CUDA")
_backward.implement(backward_kernel, "CUDA")
