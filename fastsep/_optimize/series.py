"""What lies behind a network's convolutions, as convolutions; and steps in a row in one native call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import _native, _ops
from .._activations import ACTIVATIONS
from .._native import CPU
from .._ops import remember
from .chains import Convolution
from .steps import DepthwiseStep, Link, PointwiseStep, is_native


class MeanStep:
    """The mean over each plane: a depthwise convolution whose kernel is the plane, of equal weights.

    Larger planes in two steps, so that no sum has many terms: over some rows each, and over those.
    """

    LARGEST = 32 * 32  # pixels to a sum

    def __init__(self, node: fx.Node, dims: tuple[int, ...], *, keepdim: bool, flatten: bool) -> None:
        self.__name__, self.node, self.dims, self.keepdim = node.name, node, dims, keepdim
        self.flatten = flatten  # all but the first dimension, behind the mean
        self.steps: dict[Any, list[DepthwiseStep]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        steps = self.steps_for(x)
        if not steps:
            y = x.mean(self.dims, keepdim=self.keepdim)
            return y.flatten(1) if self.flatten else y
        for step in steps:
            x = step(x)
        return x if self.keeps_plane else x.flatten(1)

    @property
    def keeps_plane(self) -> bool:
        """Whether the mean of an image is [N, C, 1, 1], not [N, C]."""
        return self.keepdim and not self.flatten

    def steps_for(self, x: Tensor) -> list[DepthwiseStep]:
        """The convolutions for planes like these, if any."""
        if not is_native(x):
            return []
        key = x.dtype, x.shape[1:]
        steps = self.steps.get(key)
        if steps is None:
            if x.dim() != 4 or x.dtype not in _native.DTYPES:
                return []
            if not math.prod(x.shape[1:]) or x.shape[3] > self.LARGEST:
                return []
            steps = list(self.convolutions(x))
            remember(self.steps, key, steps, 8)
        return steps

    def convolutions(self, x: Tensor) -> Iterator[DepthwiseStep]:
        _, c, h, w = x.shape
        rows = max(1, min(h, self.LARGEST // w))
        parts = -(-h // rows)
        for size, weight in (((rows, w), 1 / (h * w)), ((parts, 1), 1.0))[: 1 if parts == 1 else 2]:
            equal = torch.full((c, 1, *size), weight, dtype=x.dtype, device=CPU)
            below = (0, rows * parts - h, 0, 0) if size[1] == w and parts > 1 else (0, 0, 0, 0)
            mean = Convolution(self.node, self.__name__, equal, None, (size[0], 1), below, (1, 1), c)
            yield DepthwiseStep(mean, "identity")

    def link(self, x: Tensor) -> Link | None:
        calls, packed = [], []
        steps = self.steps_for(x)
        for i, step in enumerate(steps):
            made = step.link(x)
            if made is None:
                return None
            ((problem, address, size, *_),) = made.calls
            calls.append((problem, address, size, i, -1, -1))
            packed += made.packed
            x = made.result
        if not steps:
            return None
        return Link(calls, x if self.keeps_plane else x.new_empty(x.shape[:2]), packed)


class LinearStep:
    """A linear layer and an activation: a pointwise convolution of an image whose pixels are the rows."""

    def __init__(self, node: fx.Node, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self.__name__ = node.name
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.activate = ACTIVATIONS[activation].forward
        kernel = self.weight[:, :, None, None]
        image = Convolution(node, node.name, kernel, self.bias, (1, 1), (0, 0, 0, 0), (1, 1), 1)
        self.step = PointwiseStep(image, activation)

    def __call__(self, x: Tensor) -> Tensor:
        if self.unfit(x):
            return self.activate(F.linear(x, self.weight, self.bias))
        y = self.step(as_image(x))
        return y.permute(0, 2, 3, 1).reshape(len(x), -1)

    def unfit(self, x: Tensor) -> bool:
        fits = is_native(x) and x.dim() == 2 and x.dtype is self.weight.dtype
        return not fits or not x.is_contiguous() or not x.numel()

    def link(self, x: Tensor) -> Link | None:
        made = None if self.unfit(x) else self.step.link(as_image(x))
        return None if made is None else made._replace(result=x.new_empty(len(x), made.result.shape[1]))


def gives_image(step: Any) -> bool:
    """Whether the result of a step for an image has four dimensions."""
    return not isinstance(step, LinearStep) and (not isinstance(step, MeanStep) or step.keeps_plane)


def as_image(x: Tensor) -> Tensor:
    """Rows as the pixels of one channels-last image."""
    rows, channels = x.shape
    return x.as_strided((1, channels, rows, 1), (x.numel(), 1, channels, channels))


class Linked(Protocol):
    """A step that can be a part of a series."""

    __name__: str

    def __call__(self, *inputs: Tensor) -> Tensor: ...
    def link(self, *inputs: Tensor) -> Link | None: ...


class Part(NamedTuple):
    """Steps in one native call, for inputs of some shapes."""

    series: Any  # None where the first step has to copy its input, or has no kernel for it
    reads: list[int]
    gives: list[tuple[int, torch.Size, torch.dtype, torch.memory_format]]
    end: int  # the step behind
    packed: list[Tensor]  # the weights, of which the series has no more than the addresses


class SeriesStep:
    """Steps one after the other, on numbered values: the inputs, then the steps' results.

    Between steps that are one native call there is no Python and no fresh tensor. A step that cannot be a
    part of one, for it has to copy its input or has no kernel for it, is called as it is.
    """

    def __init__(
        self, links: list[Linked], operands: list[tuple[int, ...]], inputs: int, outputs: list[int]
    ) -> None:
        self.__name__ = f"{links[0].__name__}_to_{links[-1].__name__}"
        self.links, self.operands, self.inputs, self.outputs = links, operands, inputs, outputs
        # For each step the values that it or one behind it reads, or that are wanted.
        living = [set(outputs)]
        for i in reversed(range(len(links))):
            living.append((living[-1] - {inputs + i}) | set(operands[i]))
        self.living = [sorted(numbers) for numbers in reversed(living)]
        self.parts: dict[Any, Part] = {}
        self.whole: dict[Any, Part] = {}  # of those, by the one input: all steps, with one result

    def __call__(self, *inputs: Tensor) -> Any:
        if len(inputs) == 1 and isinstance(x := inputs[0], Tensor) and not _ops.VERBOSE:
            # What most calls are, with as little Python as can be.
            whole = self.whole.get((x.shape, x.stride(), x.dtype))
            if whole is not None and is_native(x):
                ((_, shape, dtype, layout),) = whole.gives
                result = torch.empty(shape, dtype=dtype, device=CPU, memory_format=layout)
                if _native.own_pool:
                    _native.core.set_num_threads(torch.get_num_threads())
                whole.series.run([x.data_ptr()], [result.data_ptr()])
                return result
        if not all(is_native(x) for x in inputs if isinstance(x, Tensor)):
            return self.one_by_one(lambda step, *operands: step(*operands), *inputs)
        values: dict[int, Tensor] = dict(enumerate(inputs))
        begin, count = 0, len(self.links)
        while begin < count:
            part = None if _ops.VERBOSE else self.part(begin, values)
            if part is None or part.series is None:
                step = self.links[begin]
                values[self.inputs + begin] = step(*[values[number] for number in self.operands[begin]])
                begin += 1
            else:
                self.run(part, values)
                begin = part.end
            values = {number: values[number] for number in self.living[begin]}
        results = tuple([values[number] for number in self.outputs])
        return results if len(results) > 1 else results[0]

    def run(self, part: Part, values: dict[int, Tensor]) -> None:
        results = [
            torch.empty(shape, dtype=dtype, device=CPU, memory_format=layout)
            for _, shape, dtype, layout in part.gives
        ]
        if _native.own_pool:
            _native.core.set_num_threads(torch.get_num_threads())
        addresses = [values[number].data_ptr() for number in part.reads]
        part.series.run(addresses, [result.data_ptr() for result in results])
        for (number, *_), result in zip(part.gives, results, strict=True):
            values[number] = result

    def one_by_one(self, call: Callable[..., Tensor], *inputs: Tensor) -> Any:
        """Each step by call(step, *its inputs)."""
        values = [*inputs]
        for step, operands in zip(self.links, self.operands, strict=True):
            values.append(call(step, *[values[number] for number in operands]))
        results = tuple([values[number] for number in self.outputs])
        return results if len(results) > 1 else results[0]

    def part(self, begin: int, values: dict[int, Any]) -> Part:
        """The native call that begins with a step, for values like these."""
        key = (
            begin,
            *[(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else None for x in values.values()],
        )
        part = self.parts.get(key)
        if part is None:
            part = self.prepare(begin, values)
            # For each of 16 shapes of the inputs there may be as many as steps.
            remember(self.parts, key, part, 16 * len(self.links))
            whole = part.series is not None and part.end == len(self.links)
            gives = [number for number, *_ in part.gives]
            if whole and len(values) == len(gives) == 1 and gives == self.outputs:
                remember(self.whole, key[1], part, 16)
        return part

    def prepare(self, begin: int, values: dict[int, Any]) -> Part:
        like, links = dict(values), []
        for i in range(begin, len(self.links)):
            made = self.links[i].link(*[like[number] for number in self.operands[i]])
            if made is None:
                break
            links.append(made)
            like[self.inputs + i] = made.result
        end = begin + len(links)
        reads = sorted(
            {number for operands in self.operands[begin:end] for number in operands if number in values}
        )
        gives = [number for number in self.living[end] if number not in values]
        # The numbers of the native series: what it reads, then its calls, for some steps more than one.
        native = {number: i for i, number in enumerate(reads)}
        calls: list[Any] = []
        for i, made in enumerate(links, begin):
            local = [native[number] for number in self.operands[i]]
            local += range(len(reads) + len(calls), len(reads) + len(calls) + len(made.calls))
            for what, address, size, *numbers in made.calls:
                calls.append((what, address, size, *[-1 if j < 0 else local[j] for j in numbers]))
            native[self.inputs + i] = local[-1]
        series = (
            _native.core.Series(calls, len(reads), [native[number] for number in gives]) if calls else None
        )
        layouts = {2: torch.contiguous_format, 4: torch.channels_last}
        results = [
            (number, like[number].shape, like[number].dtype, layouts[like[number].dim()]) for number in gives
        ]
        return Part(
            series,
            reads,
            results if calls else [],
            end,
            [weights for made in links for weights in made.packed],
        )
