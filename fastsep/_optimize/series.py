"""What lies behind a network's convolutions, as convolutions; and steps in a row in one native call."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import _native, _ops
from .chains import Convolution
from .steps import DepthwiseStep, Link, PointwiseStep, is_native, remember


class MeanStep:
    """The mean over each plane: a depthwise convolution whose kernel is the plane, of equal weights.

    Planes beyond a thousand pixels are torch's: here each is one sum, whose rounding grows with it.
    """

    LARGEST = 32 * 32

    def __init__(self, node: fx.Node, dims: tuple[int, ...], *, keepdim: bool, flatten: bool) -> None:
        self.__name__, self.node, self.dims, self.keepdim = node.name, node, dims, keepdim
        self.flatten = flatten  # all but the first dimension, behind the mean
        self.steps: dict[Any, DepthwiseStep] = {}

    def __call__(self, x: Tensor) -> Tensor:
        step = self.step(x)
        if step is None:
            y = x.mean(self.dims, keepdim=self.keepdim)
            return y.flatten(1) if self.flatten else y
        y = step(x)
        return y.flatten(1) if self.flatten or not self.keepdim else y

    def step(self, x: Tensor) -> DepthwiseStep | None:
        """The convolution for planes like these."""
        if not is_native(x):
            return None
        key = x.dtype, x.shape[1:]
        step = self.steps.get(key)
        if step is None:
            if x.dim() != 4 or x.dtype not in _native.DTYPES:
                return None
            c, h, w = x.shape[1:]
            if not c or not 0 < h * w <= self.LARGEST:
                return None
            equal = torch.full((c, 1, h, w), 1 / (h * w), dtype=x.dtype)
            mean = Convolution(self.node, self.__name__, equal, None, (1, 1), (0, 0, 0, 0), (1, 1), c)
            step = DepthwiseStep(mean, "identity")
            remember(self.steps, key, step, 8)
        return step

    def link(self, x: Tensor) -> Link | None:
        step = self.step(x)
        made = None if step is None else step.link(x)
        if made is None or (self.keepdim and not self.flatten):
            return made
        call, result, packed = made
        return call, result.new_empty(result.shape[:2]), packed


class LinearStep:
    """A linear layer: a pointwise convolution of an image whose pixels are the rows."""

    def __init__(self, node: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
        self.__name__ = node.name
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        kernel = self.weight[:, :, None, None]
        image = Convolution(node, node.name, kernel, self.bias, (1, 1), (0, 0, 0, 0), (1, 1), 1)
        self.step = PointwiseStep(image, "identity")

    def __call__(self, x: Tensor) -> Tensor:
        if self.unfit(x):
            return F.linear(x, self.weight, self.bias)
        y = self.step(as_image(x))
        return y.permute(0, 2, 3, 1).reshape(len(x), -1)

    def unfit(self, x: Tensor) -> bool:
        fits = is_native(x) and x.dim() == 2 and x.dtype is self.weight.dtype
        return not fits or not x.is_contiguous() or not x.numel()

    def link(self, x: Tensor) -> Link | None:
        made = None if self.unfit(x) else self.step.link(as_image(x))
        if made is None:
            return None
        call, result, packed = made
        return call, result.new_empty(len(x), result.shape[1]), packed


def as_image(x: Tensor) -> Tensor:
    """Rows as the pixels of one channels-last image."""
    rows, channels = x.shape
    return x.as_strided((1, channels, rows, 1), (x.numel(), 1, channels, channels))


class Linked(Protocol):
    """A step that can be a part of a series."""

    __name__: str

    def __call__(self, x: Tensor) -> Tensor: ...
    def link(self, x: Tensor) -> Link | None: ...


class SeriesStep:
    """Steps one after the other. Between them there is no Python and no fresh tensor."""

    def __init__(self, links: list[Linked]) -> None:
        self.__name__ = f"{links[0].__name__}_to_{links[-1].__name__}"
        self.links = links
        self.calls: dict[Any, Any] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not is_native(x):
            for step in self.links:
                x = step(x)
            return x
        key = x.shape, x.stride(), x.dtype
        call = self.calls.get(key)
        if call is None:
            call = self.prepare(x)
            remember(self.calls, key, call, 16)
        series, shape, layout, rest, _ = call
        if series is None or _ops.VERBOSE:
            rest = self.links
        else:
            output = torch.empty(shape, dtype=x.dtype, memory_format=layout)
            if _native.own_pool:
                _native.core.set_num_threads(torch.get_num_threads())
            series.run(x.data_ptr(), output.data_ptr())
            x = output
        for step in rest:
            x = step(x)
        return x

    def prepare(self, x: Tensor) -> tuple[Any, torch.Size, torch.memory_format, list[Linked], list[Tensor]]:
        """For inputs like this one: the series, its result's shape and layout, the steps behind it, and the
        packed weights, of which the series has no more than the addresses.

        It ends before a step that has to copy its input, or has no kernel for it.
        """
        like, calls, weights = x, [], []
        for step in self.links:
            made = step.link(like)
            if made is None:
                break
            call, like, packed = made
            calls.append(call)
            weights.append(packed)
        layout = torch.channels_last if like.dim() == 4 else torch.contiguous_format
        series = _native.core.Series(calls) if calls else None
        return series, like.shape, layout, self.links[len(calls) :], weights
