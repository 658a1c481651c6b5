"""DepthwiseConv2d, the layer, and what both layers ask of an nn.Conv2d."""

from __future__ import annotations

import copy
import operator
import sys
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._activations import activation_name
from .functional import (
    Padding,
    Pads,
    Pair,
    Size,
    depthwise_conv2d,
    parse_padding,
    parse_pair,
    same_padding,
)

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution, where each channel has filters of its own, and an activation behind it.

    >>> layer = DepthwiseConv2d(32, 32, 3, stride=2, padding="same", activation="relu6")
    >>> layer(torch.randn(8, 32, 112, 112)).shape
    torch.Size([8, 32, 56, 56])

    input: [N, C, H, W] or [C, H, W]. The result, [N, C*m, OH, OW] or [C*m, OH, OW], has the input's format.
    in_channels, out_channels: C and C*m, m filters for each channel.
    kernel_size, stride, dilation: an int or (height, width).
    padding: an int, (height, width), ((top, bottom), (left, right)), "valid" or "same"; see separable_conv2d.
    groups: None or in_channels, for calls that were written for nn.Conv2d.
    bias: whether the convolution adds one.
    padding_mode: "zeros", "reflect", "replicate" or "circular", as in nn.Conv2d.
    activation: see separable_conv2d.

    ValueError for a size or a word out of range and for other groups, TypeError for an argument of the wrong
    type; a call raises what depthwise_conv2d does. For the source see separable_conv2d.

    It is an nn.Conv2d with its initialisation, so the keys of the state dict, hooks, parametrizations and
    pruning are as there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        in_channels, out_channels = check_counts(in_channels=in_channels, out_channels=out_channels)
        check_groups(groups, in_channels)
        check_flags(bias=bias)
        if out_channels % in_channels:
            raise ValueError(
                f"out_channels must be a multiple of in_channels, {in_channels}, got {out_channels}"
            )
        kernel, steps, dilations = parse_sizes(kernel_size=kernel_size, stride=stride, dilation=dilation)
        own, convs = split_padding(padding, steps)
        activation_name(activation, "activation")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            *(in_channels, out_channels, kernel, steps, convs, dilations, in_channels, bias, padding_mode),
            **factory,
        )
        if own is not None:
            self.padding: Any = own
        self.activation = activation

    def extra_repr(self) -> str:
        """nn.Conv2d's, and what it does not know."""
        conv: Any = super()  # Any, for the method has no types
        text: str = conv.extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *weights_of(self))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What subclasses of an nn.Conv2d call with weights of their own."""
        if isinstance(input, Tensor) and torch._C._get_tracing_state() is None:
            check_channels(input, self.groups)
        padding: Padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = pad(input, pads_of(input, self), self.padding_mode), 0
        elif isinstance(padding, str):
            top, bottom, left, right = pads_of(input, self)
            padding = (top, bottom), (left, right)
        return depthwise_conv2d(
            input, weight, bias, self.stride, padding, self.dilation, activation=self.activation
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> DepthwiseConv2d:
        # torch.nn.utils.fusion.fuse_conv_bn_eval() copies a convolution, and folds into the copy a norm that
        # would come before the activation. It asks for no more than a weight and a bias.
        if self.activation is not None and sys._getframe(2).f_code.co_name == "fuse_conv_bn_eval":
            raise RuntimeError(
                f"conv must have no activation between it and the norm behind it, got {self.activation!r}"
            )
        copied: Any = self.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied  # type: ignore[no-any-return]

    def __prepare_scriptable__(self) -> nn.Module:
        raise no_script(self)


# Of constructors


def check_counts(**counts: int) -> list[int]:
    """These numbers of channels as ints, in order; TypeError or ValueError for one that is none."""
    numbers = []
    for name, count in counts.items():
        try:
            number = operator.index(count)
        except TypeError:
            raise TypeError(f"{name} must be an int, got {count!r}") from None
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
        numbers.append(number)
    return numbers


def check_groups(groups: int | None, in_channels: int) -> None:
    if groups is not None and groups != in_channels:
        raise ValueError(f"groups must be None or in_channels, {in_channels}, got {groups!r}")


def check_flags(**flags: bool) -> None:
    """TypeError for what is no bool: a tensor, say, where one tells whether there is to be a bias."""
    for name, flag in flags.items():
        if flag is not True and flag is not False:
            got = f"a {type(flag).__name__}" if isinstance(flag, Tensor) else repr(flag)
            raise TypeError(f"{name} must be True or False, got {got}")


def parse_sizes(**sizes: Size) -> list[Pair]:
    """The pairs that these sizes stand for; TypeError or ValueError for one that is none."""
    pairs = {name: parse_pair(size, name) for name, size in sizes.items()}
    for name, pair in pairs.items():
        if min(pair) < 1:
            raise ValueError(f"{name} must be at least 1, got {pair}")
    return list(pairs.values())


def split_padding(padding: Padding, stride: Pair) -> tuple[tuple[Pair, Pair] | str | None, str | Pair]:
    """What an nn.Conv2d refuses, "same" with a stride and sides that differ, or None; and what it is told."""
    pads = parse_padding(padding, ValueError)
    if isinstance(padding, str):
        return (None, padding) if padding == "valid" or stride == (1, 1) else (padding, (0, 0))
    assert not isinstance(pads, str)
    if min(pads) < 0:
        raise ValueError(f"padding must be at least 0, got {padding!r}")
    top, bottom, left, right = pads
    if top == bottom and left == right:
        return None, (top, left)
    return ((top, bottom), (left, right)), (0, 0)


# Of a call


def check_channels(input: Tensor, channels: int) -> None:
    """RuntimeError for an image of other channels. (Another rank is for the operator to refuse.)"""
    if input.dim() in (3, 4) and not input.is_nested and input.shape[-3] != channels:
        raise RuntimeError(f"input must have {channels} channels, got {list(input.shape)}")


def no_script(layer: nn.Module) -> RuntimeError:
    """For torch.jit.script, which asks a module for what to compile in its place."""
    name = type(layer).__name__
    return RuntimeError(f"{name} cannot be scripted: use torch.jit.trace, torch.export or torch.compile")


# Of an nn.Conv2d


def pads_of(input: Tensor, conv: Any, padding: Padding | None = None) -> Pads:
    """(top, bottom, left, right) of the convolution's padding, or of another one in its place."""
    pads = parse_padding(conv.padding if padding is None else padding)
    if isinstance(pads, str):
        return same_padding(input, conv.kernel_size, conv.stride, conv.dilation)
    return pads


def pad(input: Tensor, pads: Pads, mode: str) -> Tensor:
    top, bottom, left, right = pads
    return F.pad(input, (left, right, top, bottom), "constant" if mode == "zeros" else mode)


def weights_of(conv: Any) -> tuple[Tensor, Tensor | None]:
    """weight and bias; past nn.Module's slow attribute access where they are parameters."""
    parameters = conv._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return conv.weight, conv.bias


def is_plain(conv: Any) -> bool:
    """Whether calling the module is F.conv2d on its weights and nothing else."""
    return (
        (type(conv) is nn.Conv2d or _forwards_as(nn.Conv2d, conv) or _is_plain_depthwise(conv))
        and not conv._forward_hooks
        and not conv._forward_pre_hooks
        and not conv._backward_hooks
        and not conv._backward_pre_hooks
        and "forward" not in conv.__dict__
    )


def _is_plain_depthwise(conv: Any) -> bool:
    return _forwards_as(DepthwiseConv2d, conv) and conv.activation is None


def _forwards_as(base: type, conv: Any) -> bool:
    """Also for subclasses such as those that torch.nn.utils.parametrize makes."""
    methods = ("forward", "_conv_forward", "__call__", "_call_impl")
    return isinstance(conv, base) and all(getattr(type(conv), m) is getattr(base, m) for m in methods)
