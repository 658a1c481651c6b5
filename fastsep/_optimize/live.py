"""Pairs for training: the step reads the weights of the modules in each call, and autograd watches it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..functional import dispatch, same_padding
from .chains import Convolution


class LiveStep:
    """The layer's operator on the weights that two nn.Conv2d have at the time."""

    def __init__(
        self, depthwise: Convolution, mid_activation: str, pointwise: Convolution, activation: str
    ) -> None:
        assert depthwise.module is not None
        assert pointwise.module is not None
        self.__name__ = depthwise.name.replace(".", "_")
        self.depthwise: nn.Conv2d = depthwise.module
        self.pointwise: nn.Conv2d = pointwise.module
        self.stride, self.padding, self.dilation = depthwise.stride, depthwise.padding, depthwise.dilation
        self.activations = mid_activation, activation

    def __call__(self, x: Tensor) -> Tensor:
        depthwise, pointwise = self.depthwise, self.pointwise
        pads: Any = self.padding
        if isinstance(pads, str):
            kernel: Any = depthwise.kernel_size
            pads = same_padding(x, kernel, self.stride, self.dilation)
        weights = depthwise.weight, pointwise.weight, depthwise.bias, pointwise.bias
        return dispatch(x, *weights, None, self.stride, pads, self.dilation, *self.activations)
