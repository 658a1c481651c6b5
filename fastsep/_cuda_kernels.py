"""The operators on tensors of a GPU. fastsep/_plan.py chooses among the paths of fastsep/_cuda_paths.py.

The first call of a kind finds out what serves it, and the rest look that up: a dictionary, the output's
memory, a launch. Nothing waits for the device, but where FASTSEP_VERBOSE or torch.backends.cudnn.benchmark
asks for times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _backward, _native, _ops, _plan
from ._cuda_model import BACKWARD, FORWARD, Asked, Problem
from ._cuda_paths import (
    Backward,
    BackwardPath,
    Five,
    Forward,
    ForwardPath,
    Weight,
    allows_tf32,
    products_allow_tf32,
)

T = TypeVar("T")

_benchmark = torch._C._get_cudnn_benchmark  # torch.backends.cudnn.benchmark, without a property's way to it


def key_of(tensors: Five, stride: Any, padding: Any, dilation: Any, *rest: Any) -> tuple[Any, ...]:
    """All that tells apart calls which different things may be decided for.

    What is made for a call, its output and dense copies, needs no look: torch's allocator aligns more than
    any kernel asks for.
    """
    input, dw, pw, db, b = tensors
    dtype = input.dtype
    aligned = input.data_ptr() | dw.data_ptr()
    of_pw = of_db = of_b = None
    if pw is not None:
        of_pw = pw.shape, pw.dtype, pw.device
        aligned |= pw.data_ptr()
    if db is not None:
        of_db = db.shape, db.dtype, db.device
        aligned |= db.data_ptr()
    if b is not None:
        of_b = b.shape, b.dtype, b.device
        aligned |= b.data_ptr()
    exact = dtype is torch.float32 and (allows_tf32(), products_allow_tf32())
    return (
        *(
            input.shape,
            input.stride(),
            dtype,
            input.device,
            dw.shape,
            dw.dtype,
            dw.device,
            of_pw,
            of_db,
            of_b,
        ),
        *(tuple(stride), tuple(padding), tuple(dilation), *rest, exact, aligned % 16 == 0),
        *(_benchmark(), _plan.forced()),
    )


def forward_kernel(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Weight,
    depthwise_bias: Weight,
    bias: Weight,
    packed: Weight,
    *geometry: Any,
) -> Tensor:
    """With the arguments of the kernel for the CPU."""
    tensors: Five = input, depthwise_weight, pointwise_weight, depthwise_bias, bias
    try:
        key = key_of(tensors, *geometry)
        path: ForwardPath | None = _plan.calls.get(key)
        if path is not None and not _ops.VERBOSE:
            return path(tensors)
        return _first_forward(tensors, packed, geometry, key)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error} {where('forward', tensors)}") from error


def _first_forward(tensors: Five, packed: Weight, geometry: tuple[Any, ...], key: tuple[Any, ...]) -> Tensor:
    """A call of a kind that nothing was decided for."""
    input, _, _, depthwise_bias, bias = tensors
    composed = partial(_ops.composed_kernel, *tensors, packed, *geometry)
    if reason := why_not(tensors):
        return reported(composed, reason, tensors, geometry)
    problem, shape, format = _ops.native_problem(*tensors, *geometry)
    if reason := refusal(problem):
        return reported(composed, reason, tensors, geometry)
    if shape[0] == 0:
        return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=format)
    tf32 = input.dtype is torch.float32 and allows_tf32()
    paths = Forward.of(problem, shape, format, tf32).paths(tensors, geometry)
    asked = Asked(depthwise_bias is not None, bias is not None, aligned=key[-3])
    candidates = {name: partial(path, tensors) for name, path in paths.items()}
    choice = _plan.choose(problem, FORWARD, tf32, asked, input.device.index, candidates)
    _plan.keep(key, choice, paths)
    return reported(candidates[choice.path], choice, tensors, geometry)


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
    """With the arguments of the kernel for the CPU."""
    tensors: Five = input, depthwise_weight, pointwise_weight, depthwise_bias, bias
    *geometry, needed = rest
    try:
        key = key_of(tensors, *geometry, tuple(needed), _kind(grad), _kind(saved))
        path: BackwardPath | None = _plan.calls.get(key)
        if path is not None and not _ops.VERBOSE:
            return path(grad, tensors, saved)
        return _first_backward(grad, tensors, saved, tuple(geometry), tuple(needed), key)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error} {where('backward', tensors)}") from error


def _kind(tensor: Weight) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _first_backward(
    grad: Tensor,
    tensors: Five,
    saved: Weight,
    geometry: tuple[Any, ...],
    needed: tuple[bool, ...],
    key: tuple[Any, ...],
) -> list[Tensor]:
    input, _, pointwise_weight, depthwise_bias, bias = tensors
    names = [name for name, need in zip(_ops.tensor_names(pointwise_weight), needed, strict=True) if need]
    what = f"gradients of {', '.join(names)}"
    composed = partial(_backward.composed_kernel, grad, *tensors, saved, *geometry, needed)
    if reason := why_not(tensors):
        return reported(composed, reason, tensors, geometry, what)
    problem, shape, format = _ops.native_problem(*tensors, *geometry)
    if reason := refusal(problem):
        return reported(composed, reason, tensors, geometry, what)
    _backward.check_gradients(grad, tensors, saved, shape, needed)
    if shape[0] == 0 or not any(needed):
        return _backward.empty_gradients(tensors, format, needed, zeros=True)
    tf32 = input.dtype is torch.float32 and allows_tf32()
    paths = Backward(Forward.of(problem, shape, format, tf32), needed, geometry).paths(tensors)
    asked = Asked(depthwise_bias is not None, bias is not None, needed, saved is not None, key[-3])
    candidates = {name: partial(path, grad, tensors, saved) for name, path in paths.items()}
    choice = _plan.choose(problem, BACKWARD, tf32, asked, input.device.index, candidates)
    _plan.keep(key, choice, paths)
    return reported(candidates[choice.path], choice, tensors, geometry, what)


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


def where(name: str, tensors: Five) -> str:
    """The call that an error is of, as csrc/cuda/bindings.cpp says it."""
    input, depthwise_weight, pointwise_weight = tensors[:3]
    dtype = str(input.dtype).removeprefix("torch.")
    k = 0 if pointwise_weight is None else pointwise_weight.shape[0]
    kernel = " x ".join(str(size) for size in depthwise_weight.shape[2:])
    return (
        f"In the {name} pass for the {dtype} input {list(input.shape)}, {k} output channels and a kernel of "
        f"{kernel}."
    )


def reported(
    run: Callable[[], T], why: str | _plan.Choice, tensors: Five, geometry: tuple[Any, ...], what: str = ""
) -> T:
    """Runs it, with FASTSEP_VERBOSE between two events; the line says what the device took."""
    if not _ops.VERBOSE:
        return run()
    device = tensors[0].device
    path, reason = ("composition", why) if isinstance(why, str) else (f"cuda {why.path}", why.why)
    path = f"{'backward ' if what else ''}{path} | {reason}{f', {what}' if what else ''}"
    if _plan.is_capturing(device.index):
        result, took = run(), "not timed in a graph"
    else:
        results: list[T] = []
        with torch.cuda.device(device):
            seconds = _plan.Stopwatch()(lambda: results.append(run()), 1)
        result, took = results[0], f"{seconds * 1e3:.3f} ms on the device, waited for"
    _ops.report(path, 0.0, tensors, geometry, took=took)
    return result


_ops.implement(forward_kernel, "CUDA")
_backward.implement(backward_kernel, "CUDA")
_ops.cuda_kernel, _backward.cuda_kernel = forward_kernel, backward_kernel
