"""What an optimized model calls: functions of a tensor with weights folded and packed once.

They trust their caller: forward.py lets nothing in that autograd, a transform, a compiler or a mode watches.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import _expanded, _native, _ops
from .._activations import ACTIVATIONS, IN_PLACE
from .._native import CPU
from .._ops import remember
from ..functional import same_padding
from .chains import Convolution

# The problem, the output's shape and layout, whether the input is dense in it, and whether it is the input's.
Prepared = tuple[tuple[int, ...], tuple[int, ...], torch.memory_format, bool, bool]


class Link(NamedTuple):
    """A step as calls of Series, whose values are the step's inputs and then the results of these calls."""

    calls: list[tuple[tuple[int, ...], int, int, int, int, int]]
    result: Tensor  # one like it
    packed: list[Tensor]  # weights, which must live as long as the series


# Shapes of inputs for which a step keeps what it worked out.
_REMEMBERED = 64


def is_native(x: Tensor) -> bool:
    """Whether a tensor's numbers are what lies at its address, on the CPU."""
    return _native.stored(x) == 1


def kernel_of(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2], weight.shape[3]


class PackedStep:
    """A native call on packed weights. For each shape of the input all but the addresses is known.

    Behind the input a step that is `gated` takes factors [N, C, 1, 1] of the input, and one with a `residual`
    a tensor that is added to the result: where their layouts differ, the sum has that of the first.
    """

    gated = residual = residual_first = False

    def __init__(
        self,
        depthwise: Convolution,
        mid_activation: str,
        pointwise: Convolution | None,
        activation: str,
    ) -> None:
        self.__name__ = depthwise.name.replace(".", "_")
        self.weights = (
            depthwise.weight.detach(),
            None if pointwise is None else pointwise.weight.detach(),
            None if depthwise.bias is None else depthwise.bias.detach(),
            None if pointwise is None or pointwise.bias is None else pointwise.bias.detach(),
        )
        self.dtype = depthwise.weight.dtype
        self.channels = depthwise.in_channels
        self.stride, self.padding, self.dilation = depthwise.stride, depthwise.padding, depthwise.dilation
        self.mid_activation, self.activation = mid_activation, activation
        packed = self.pack()
        assert packed is not None
        self.packed = packed
        self.packed_at = packed.data_ptr(), packed.numel()
        self.calls: dict[Any, Any] = {}

    def pack(self) -> Tensor | None:
        return _native.pack(self.channels, *self.weights)

    def __call__(self, x: Tensor, *operands: Tensor) -> Tensor:
        if operands:
            return self.with_operands(x, *operands)
        call = None if _ops.VERBOSE else self.calls.get((x.shape, x.stride()))
        if call is None or x.dtype is not self.dtype or not is_native(x):
            if x.dim() == 3:
                y = self(x.unsqueeze(0)).squeeze(0)
                return y.contiguous() if x.is_contiguous() else y
            x = _native.as_stored(x, "input")
            if not is_native(x):
                raise RuntimeError(f"input must be a dense tensor on the CPU, got {x.layout} on {x.device}")
            call = self.prepare(x)
            if _ops.VERBOSE:
                return self.reported(x)
        problem, shape, layout, dense, kept = call
        if not dense:
            x = x.contiguous(memory_format=layout)
        output = torch.empty(shape, dtype=self.dtype, device=CPU, memory_format=layout)
        if _native.own_pool:
            _native.core.set_num_threads(torch.get_num_threads())
        _native.core.forward_packed(problem, "", x.data_ptr(), *self.packed_at, output.data_ptr())
        return output if kept else row_major(output)

    def with_operands(self, x: Tensor, *operands: Tensor) -> Tensor:
        call = None if _ops.VERBOSE else self.linked(x, *operands)
        gate = operands[0] if self.gated else None
        residual = operands[-1] if self.residual else None
        if call is None:
            y = self(x if gate is None else x * gate)
            if residual is None:
                return y
            return residual + y if self.residual_first else y + residual
        problem = call[0]
        output = torch.empty(call[1], dtype=self.dtype, device=CPU, memory_format=torch.channels_last)
        if _native.own_pool:
            _native.core.set_num_threads(torch.get_num_threads())
        addresses = (0 if extra is None else extra.data_ptr() for extra in (gate, residual))
        _native.core.forward_packed(problem, "", x.data_ptr(), *self.packed_at, output.data_ptr(), *addresses)
        return output

    def linked(self, x: Tensor, *operands: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The problem of a native call on these as they lie, channels-last, and the shape of its output.

        None where one is copied or does not fit.
        """
        if not is_native(x) or x.dim() != 4 or not len(x):
            return None
        call = self.calls.get((x.shape, x.stride()))
        if call is None or x.dtype is not self.dtype:
            call = self.prepare(x)
        problem, shape, layout, dense, kept = call
        if not (dense and kept and layout is torch.channels_last):
            return None
        wanted = [(*x.shape[:2], 1, 1)] * self.gated + [shape] * self.residual
        for operand, size in zip(operands, wanted, strict=True):
            alike = isinstance(operand, Tensor) and operand.dtype is self.dtype and is_native(operand)
            if not alike or operand.shape != size or not operand.is_contiguous(memory_format=layout):
                return None
        if wanted:
            problem = *problem[:20], int(self.residual), int(self.gated), *problem[22:]
        return problem, shape

    def link(self, x: Tensor, *operands: Tensor) -> Link | None:
        """The call for inputs like these, whose numbers do not matter; None where there is none."""
        call = self.linked(x, *operands)
        if call is None:
            return None
        problem, shape = call
        result = torch.empty(shape, dtype=self.dtype, device=CPU, memory_format=torch.channels_last)
        gate, residual = 1 if self.gated else -1, len(operands) if self.residual else -1
        return Link([(problem, *self.packed_at, 0, gate, residual)], result, [self.packed])

    def reported(self, x: Tensor) -> Tensor:
        """By the operator's kernel, which prints the line of FASTSEP_VERBOSE."""
        dw, pw, db, b = self.weights
        pads = self.padding
        if isinstance(pads, str):
            pads = same_padding(x, kernel_of(dw), self.stride, self.dilation)
        geometry = self.stride, pads, self.dilation, self.mid_activation, self.activation
        return _ops.cpu_kernel(x, dw, pw, db, b, self.packed, *geometry)

    def prepare(self, x: Tensor) -> Prepared:
        dw, pw, db, b = self.weights
        pads = self.padding
        if isinstance(pads, str):
            pads = same_padding(x, kernel_of(dw), self.stride, self.dilation)
        stand_in = dw.new_empty(1, 1, 1, 1).expand(1, dw.shape[0], 1, 1) if pw is None else pw
        shape = _ops.output_shape(x, dw, stand_in, db, b, self.stride, pads, self.dilation)
        if x.dtype is not self.dtype:
            raise RuntimeError(f"input must have the weights' dtype, {self.dtype}, got {x.dtype}")
        n, c, h, w = x.shape
        inner, _, kh, kw = dw.shape
        k = 0 if pw is None else pw.shape[0]
        layout = _ops.memory_format(x)
        problem = (
            *(n, c, h, w, k, inner // c, kh, kw, *self.stride, *self.dilation, *pads),
            *(_native.DTYPES[self.dtype], int(layout is torch.channels_last)),
            *(ACTIVATIONS[self.mid_activation].code, ACTIVATIONS[self.activation].code),
        )
        return self.remember(x, problem, (n, k or inner, *shape[2:]), layout)

    def remember(
        self, x: Tensor, problem: tuple[int, ...], shape: tuple[int, ...], layout: torch.memory_format
    ) -> Prepared:
        kept = _ops.memory_format(x) is layout
        call = problem, shape, layout, x.is_contiguous(memory_format=layout), kept
        remember(self.calls, (x.shape, x.stride()), call, _REMEMBERED)
        return call


class SeparableStep(PackedStep):
    """A depthwise convolution, an activation, a pointwise convolution, an activation."""

    def __init__(
        self, depthwise: Convolution, mid_activation: str, pointwise: Convolution, activation: str
    ) -> None:
        super().__init__(depthwise, mid_activation, pointwise, activation)
        self.halves = depthwise, mid_activation, pointwise, activation


class DepthwiseStep(PackedStep):
    """A depthwise convolution and an activation."""

    def __init__(self, depthwise: Convolution, activation: str) -> None:
        super().__init__(depthwise, activation, None, "identity")


class PointwiseStep(PackedStep):
    """A pointwise convolution of any stride and an activation: the depthwise half copies, or scales."""

    def __init__(self, pointwise: Convolution, activation: str, *, gated: bool = False) -> None:
        super().__init__(copying(pointwise, pointwise.in_channels), "identity", pointwise, activation)
        self.gated = gated


def copying(like: Convolution, channels: int) -> Convolution:
    """A depthwise half that changes nothing, with the name, stride and padding of another convolution."""
    ones = like.weight.new_ones(channels, 1, 1, 1)
    return replace(like, weight=ones, bias=None, groups=channels, dilation=(1, 1))


class ExpandedStep(PackedStep):
    """A dense convolution and an activation before the pair or a depthwise convolution.

    With `sum_with_input` the input is added to the result. Channels-last: another input is converted, and the
    result back. But a `planar` step takes an image in NCHW as it lies, and gives its result channels-last.
    """

    planar = False

    def __init__(
        self,
        expand: Convolution,
        expand_activation: str,
        depthwise: Convolution,
        mid_activation: str,
        pointwise: Convolution | None = None,
        activation: str = "identity",
        *,
        sum_with_input: bool = False,
    ) -> None:
        self.expand, self.expand_activation, self.sum_with_input = expand, expand_activation, sum_with_input
        super().__init__(depthwise, mid_activation, pointwise, activation)
        self.channels = expand.in_channels

    def pack(self) -> Tensor | None:
        bias = self.expand.bias
        expand = self.expand.weight.detach(), None if bias is None else bias.detach()
        return _native.pack(self.channels, *self.weights, *expand)

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """What the operator takes but the packed weights."""
        dw, pw, db, b = self.weights
        expand = self.expand
        ew, eb = expand.weight.detach(), None if expand.bias is None else expand.bias.detach()
        e_pads, pads = expand.padding, self.padding
        if isinstance(e_pads, str):
            e_pads = same_padding(x, kernel_of(ew), expand.stride, expand.dilation)
        if isinstance(pads, str):
            sides = zip(x.shape[-2:], (e_pads[:2], e_pads[2:]), ew.shape[2:], expand.stride, strict=True)
            plane = [_expanded.expanded_size(size, *ends, k, s) for size, ends, k, s in sides]
            pads = same_padding(x.new_empty(()).expand(plane), kernel_of(dw), self.stride, self.dilation)
        geometry = expand.stride, e_pads, self.stride, pads, self.dilation
        activations = self.expand_activation, self.mid_activation, self.activation
        return x, ew, dw, pw, eb, db, b, *geometry, *activations, self.sum_with_input

    def prepare(self, x: Tensor) -> Prepared:
        problem, shape = _expanded.native_problem(*self.arguments(x))
        layout = torch.channels_last
        if not self.planar or not x.is_contiguous() or x.is_contiguous(memory_format=layout):
            return self.remember(x, problem, shape, layout)
        call = (*problem[:-1], 1), shape, layout, True, True
        remember(self.calls, (x.shape, x.stride()), call, _REMEMBERED)
        return call

    def can_be_planar(self) -> bool:
        """Whether the kernels have it for NCHW."""
        return self.channels == 3 and self.expand.stride[1] == 2 and not self.sum_with_input

    def reported(self, x: Tensor) -> Tensor:
        arguments = self.arguments(x.contiguous(memory_format=torch.channels_last))
        return _expanded.cpu_kernel(*arguments[:7], self.packed, *arguments[7:])


class ImageStep(ExpandedStep):
    """A dense convolution on an image and an activation: an expansion behind which nothing changes."""

    def __init__(self, convolution: Convolution, activation: str) -> None:
        nothing = copying(convolution, convolution.weight.shape[0])
        nothing = replace(nothing, stride=(1, 1), padding=(0, 0, 0, 0))
        super().__init__(convolution, activation, nothing, "identity")


def gather(steps: Iterable[PackedStep]) -> None:
    """Puts the weights of steps that nobody calls yet on large pages.

    A network reads all of its weights once a call. On pages of 4096 bytes those of MobileNetV2 take 3500
    entries, more than the processor has for them: to look the others up was 1.5 % of the time.
    """
    steps, place = list(steps), 0
    sizes = [-(-step.packed.numel() // _LINE) * _LINE for step in steps]
    room = _large_pages(sum(sizes))
    if room is None:
        return
    for step, size in zip(steps, sizes, strict=True):
        packed = room[place : place + step.packed.numel()].copy_(step.packed)
        step.packed, step.packed_at = packed, (packed.data_ptr(), packed.numel())
        place += size


_LINE, _LARGE_PAGE = 64, 2 << 20


def _large_pages(size: int) -> Tensor | None:
    """Fresh memory at a multiple of a large page; None for less than one, or where the system gives none."""
    advice: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < _LARGE_PAGE:
        return None
    whole = -(-size // _LARGE_PAGE) * _LARGE_PAGE
    try:
        memory = mmap.mmap(-1, whole + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # the weights stay where they are
        return None
    with contextlib.suppress(OSError):  # a system that was built without
        memory.madvise(advice)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    return room[-room.data_ptr() % _LARGE_PAGE :][:size]


class DenseStep:
    """torch's convolution with folded weights, and the activation in place behind it."""

    def __init__(self, convolution: Convolution, activation: str) -> None:
        self.__name__ = convolution.name.replace(".", "_")
        self.weight = convolution.weight.detach()
        self.bias = None if convolution.bias is None else convolution.bias.detach()
        padding: Any = convolution.padding
        if not isinstance(padding, str):  # nn.Conv2d's, so the same on both sides
            padding = padding[0], padding[2]
        self.geometry: Any = convolution.stride, padding, convolution.dilation, convolution.groups
        self.activate: Callable[[Tensor], Tensor] | None = None
        if activation != "identity":
            self.activate = IN_PLACE.get(activation, ACTIVATIONS[activation].forward)

    def to_channels_last(self) -> None:
        """For channels-last inputs: of others torch would give the result the format of the weight."""
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.conv2d(x, self.weight, self.bias, *self.geometry)
        return y if self.activate is None else self.activate(y)


def add(a: Tensor, b: Tensor | float) -> Tensor:
    """a + b, where a is nobody else's."""
    if isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride():
        return a.add_(b)
    return a + b


def add_behind(a: Tensor, b: Tensor | float) -> Tensor:
    """b + a, where a is nobody else's. (The sum has the layout of the first.)"""
    if isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride():
        return a.add_(b)
    return b + a


def as_contiguous(x: Any) -> Any:
    """Row-major tensors, in any nesting, of those with four dimensions."""
    return tree_map_only(Tensor, row_major, x)


def row_major(x: Tensor) -> Tensor:
    """Contiguous, an image with the strides that a fresh one has, also of one channel or of none."""
    if x.dim() != 4:
        return x
    x = x.contiguous()
    return x.flatten().view(x.shape) if 1 in x.shape or not x.numel() else x
