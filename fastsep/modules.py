"""SeparableConv2d, the layer."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import _native
from ._activations import ACTIVATIONS, activation_name
from ._native import PLAIN
from .depthwise import (
    PaddingMode,
    check_channels,
    check_counts,
    check_flags,
    check_groups,
    is_plain,
    no_script,
    pad,
    pads_of,
    parse_sizes,
    split_padding,
    weights_of,
)
from .functional import Padding, Pads, Pair, Size, dispatch

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # since torch 2.7


class _Sizes(NamedTuple):
    kernel_size: Pair
    stride: Pair
    dilation: Pair


_ACTIVATIONS = "mid_activation", "activation"

# Hooks on every module of the process. torch fills these dictionaries and never replaces them.
_global_backward_hooks = torch_module._global_backward_hooks
_global_backward_pre_hooks = torch_module._global_backward_pre_hooks
_global_forward_hooks = torch_module._global_forward_hooks
_global_forward_pre_hooks = torch_module._global_forward_pre_hooks


class SeparableConv2d(nn.Module):
    """A depthwise convolution and the pointwise convolution behind it, computed in one pass.

    >>> layer = SeparableConv2d(32, 64, 3, stride=2, padding="same", mid_activation="relu6")
    >>> layer(torch.randn(8, 32, 112, 112)).shape
    torch.Size([8, 64, 56, 56])

    input: [N, C, H, W] or [C, H, W]. The result, [N, K, OH, OW] or [K, OH, OW], has the input's format.
    in_channels, out_channels: C and K.
    kernel_size, stride, dilation: of the depthwise convolution; an int or (height, width).
    padding: an int, (height, width), ((top, bottom), (left, right)), "valid" or "same"; see separable_conv2d.
    depth_multiplier: depthwise filters for each channel.
    bias, depthwise_bias: whether the pointwise and the depthwise convolution add one.
    padding_mode: "zeros", "reflect", "replicate" or "circular", as in nn.Conv2d.
    mid_activation, activation: behind the depthwise and the pointwise convolution; see separable_conv2d.
    groups: None or in_channels, for calls that were written for nn.Conv2d.

    ValueError for a size or a word out of range, TypeError for an argument of the wrong type; a call raises
    what separable_conv2d does, and has the same source.

    The children `depthwise` and `pointwise` are nn.Conv2d with their defaults and initialisation, so what is
    known of two such layers holds here: the keys of the state dict, hooks, parametrizations, pruning. A child
    that was replaced or hooked is called, like the child of any module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        depthwise_bias: bool = False,
        mid_activation: str | None = None,
        activation: str | None = None,
        groups: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        module: Any = super()  # Any, for some of its methods have no types
        module.__init__()
        in_channels, out_channels, depth_multiplier = check_counts(
            in_channels=in_channels, out_channels=out_channels, depth_multiplier=depth_multiplier
        )
        check_groups(groups, in_channels)
        check_flags(bias=bias, depthwise_bias=depthwise_bias)
        kernel, stride, dilation = parse_sizes(kernel_size=kernel_size, stride=stride, dilation=dilation)
        self._padding, child_padding = split_padding(padding, stride)
        # Of a padding of our own, for children in whose place there is something else.
        self._sizes = _Sizes(kernel, stride, dilation)
        self.mid_activation, self.activation = mid_activation, activation
        activation_name(mid_activation, "mid_activation")
        activation_name(activation, "activation")

        inner = in_channels * depth_multiplier
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.depthwise = nn.Conv2d(
            *(in_channels, inner, kernel, stride, child_padding, dilation),
            groups=in_channels,
            bias=depthwise_bias,
            padding_mode=padding_mode,
            **factory,
        )
        self.pointwise = nn.Conv2d(inner, out_channels, 1, bias=bias, **factory)

        self._thawed: dict[str, bool] | None = None  # of a frozen layer: requires_grad as it was before
        self._packed: Any = None  # see _native.pack()
        self._packed_weights: tuple[Tensor | None, ...] = ()
        self._warned = False  # of training while frozen
        module.register_load_state_dict_post_hook(_pack_again)

    @property
    def in_channels(self) -> int:
        return self.depthwise.in_channels

    @property
    def out_channels(self) -> int:
        return self.pointwise.out_channels

    # What tools ask of a convolution. (Its weights are those of two.)

    @property
    def kernel_size(self) -> Pair:
        return cast("Pair", self._geometry(self.depthwise).kernel_size)

    @property
    def stride(self) -> Pair:
        return cast("Pair", self._geometry(self.depthwise).stride)

    @property
    def dilation(self) -> Pair:
        return cast("Pair", self._geometry(self.depthwise).dilation)

    @property
    def padding(self) -> Padding:
        own: Padding | None = self._padding
        return self.depthwise.padding if own is None else own

    @property
    def groups(self) -> int:
        """Of the depthwise half."""
        return self.depthwise.groups

    @property
    def bias(self) -> Tensor | None:
        """Of the pointwise half."""
        return self.pointwise.bias

    def reset_parameters(self) -> None:
        self.depthwise.reset_parameters()
        self.pointwise.reset_parameters()

    def extra_repr(self) -> str:
        """What the children do not say of themselves."""
        words = [("padding", self._padding), *((name, getattr(self, name)) for name in _ACTIVATIONS)]
        parts = [f"{name}={word!r}" for name, word in words if word is not None]
        return ", ".join(parts + ["frozen"] * self.frozen)

    def forward(self, input: Tensor) -> Tensor:
        depthwise: Any = self._modules["depthwise"]
        pointwise: Any = self._modules["pointwise"]
        if (
            _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
            or torch._C._get_tracing_state() is not None
            or (type(input) is not Tensor and _overrides_torch(input))
            or not self._is_fusable(depthwise, pointwise)
        ):
            return self._call_children(input)
        dw, db = weights_of(depthwise)
        pw, b = weights_of(pointwise)
        if pw is None:  # which the child knows to refuse
            return self._call_children(input)
        if isinstance(input, Tensor):
            check_channels(input, depthwise.groups)
        pads = self._pads(input, depthwise)
        if depthwise.padding_mode != "zeros":
            input, pads = pad(input, pads, depthwise.padding_mode), (0, 0, 0, 0)
        # Packed weights belong to one processor: no part of an exported program.
        packed = None if _is_exporting() else self._packed
        if packed is not None:
            if not torch.compiler.is_compiling() and packed.made_of is None:  # as of the call before
                self._pack()
                packed = self._packed
            made_of = self._packed_weights
            if dw is not made_of[0] or pw is not made_of[1] or db is not made_of[2] or b is not made_of[3]:
                packed = None
        mid = activation_name(self.mid_activation, "mid_activation")
        last = activation_name(self.activation, "activation")
        return dispatch(input, dw, pw, db, b, packed, depthwise.stride, pads, depthwise.dilation, mid, last)

    def _is_fusable(self, depthwise: Any, pointwise: Any) -> bool:
        """Whether calling the children is the same as separable_conv2d on their weights."""
        return (
            is_plain(depthwise)
            and is_plain(pointwise)
            and depthwise.groups == depthwise.in_channels
            and pointwise.groups == 1
            and pointwise.kernel_size == (1, 1)
            and pointwise.stride == (1, 1)
            and pointwise.padding == (0, 0)
            and (self._padding is None or depthwise.padding == (0, 0))
            # nn.Conv2d makes tuples of them; who assigns something else gets what F.conv2d makes of it.
            and type(depthwise.stride) is type(depthwise.dilation) is tuple
            and type(depthwise.padding) in (tuple, str)
        )

    def _pads(self, input: Tensor, depthwise: Any) -> Pads:
        """(top, bottom, left, right)"""
        return pads_of(input, self._geometry(depthwise), self._padding)

    def _geometry(self, depthwise: Any) -> Any:
        """The depthwise child, or what it was where something without sizes is in its place."""
        known = all(type(getattr(depthwise, name, None)) is tuple for name in _Sizes._fields)
        return depthwise if known else self._sizes

    def _call_children(self, input: Tensor) -> Tensor:
        if self._padding is not None:
            mode = getattr(self.depthwise, "padding_mode", "zeros")
            input = pad(input, self._pads(input, self.depthwise), mode)
        mid, last = (ACTIVATIONS[activation_name(getattr(self, name), name)] for name in _ACTIVATIONS)
        return last.forward(self.pointwise(mid.forward(self.depthwise(input))))

    @property
    def frozen(self) -> bool:
        return self._thawed is not None

    def freeze(self) -> SeparableConv2d:
        """Packs the weights for inference once, instead of in every call, and has them require no gradient.

        >>> layer = SeparableConv2d(32, 64, 3).freeze()

        Weights that change count. Each call looks at where they lie, at their versions and at up to 64
        numbers of each; where they are not as they were it computes with them as they are, and the next one
        packs them anew. Only a write that leaves the version and those numbers as they were is not seen.
        """
        if self._thawed is None:
            self._thawed = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        self.requires_grad_(False)
        self._pack()
        return self

    def unfreeze(self) -> SeparableConv2d:
        """Undoes freeze()."""
        if self._thawed is not None:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(self._thawed.get(name, True))
        self._thawed = None
        self._pack()
        return self

    def train(self, mode: bool = True) -> SeparableConv2d:
        module: Any = super()
        module.train(mode)
        if mode and self.frozen and not self._warned:
            self._warned = True
            warnings.warn(
                "a frozen SeparableConv2d gives its weights no gradients: unfreeze() it to train",
                stacklevel=2,
            )
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        raise no_script(self)

    def _pack(self) -> None:
        self._packed, self._packed_weights = None, ()
        depthwise, pointwise = self.depthwise, self.pointwise
        if self._thawed is None or not self._is_fusable(depthwise, pointwise):
            return
        (dw, db), (pw, b) = weights_of(depthwise), weights_of(pointwise)
        weights = dw, pw, db, b
        # A parametrized weight is another tensor in every call.
        plain = all(w is None or type(w) in PLAIN for w in weights)
        if plain and dw is depthwise.weight and pw is pointwise.weight:
            self._packed, self._packed_weights = _native.pack(depthwise.in_channels, *weights), weights

    def _apply(self, fn: Any, recurse: bool = True) -> SeparableConv2d:
        module: Any = super()
        module._apply(fn, recurse)
        self._pack()
        return self

    # Packed weights belong to this process and processor; copies and pickles make their own.

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None, "_packed_weights": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module: Any = super()
        module.__setstate__(state)
        self._pack()


def _overrides_torch(input: Any) -> bool:
    """For subclasses of Tensor, and for the proxies of torch.fx."""
    return getattr(type(input), "__torch_function__", None) not in (
        None,
        torch._C._disabled_torch_function_impl,
    )


def _pack_again(layer: SeparableConv2d, _incompatible_keys: Any) -> None:
    layer._pack()
