"""The memory format that each result of a module's own forward has, as far as its graph tells.

A caller of an optimized model gets results in the strides that the model's own forward gives them, whatever
layout the graph runs in.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._ops import is_channels_last
from ..depthwise import DepthwiseConv2d
from ..modules import SeparableConv2d
from .chains import Reader
from .trace import why_opaque

# As torch's suggest_memory_format() has it: a slice keeps its tensor's. None: there is nothing with one.
Format = Literal["contiguous", "channels_last", "unknown"]
FORMATS: tuple[Format, Format] = ("contiguous", "channels_last")

_FOLLOWING_NAMES = (
    "activation",
    "batchnorm",
    "dropout",
    "linear",
    "padding",
    "pooling",
    "upsampling",
    "pixelshuffle",
)
_FOLLOWING_FILES = {f"torch.nn.modules.{name}" for name in _FOLLOWING_NAMES}
_CONTIGUOUS_MODULES = (
    *(nn.InstanceNorm2d, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.RReLU, nn.LayerNorm),
    nn.Unfold,
    nn.Linear,
    nn.Flatten,
)
_FOLLOWING_MODULES = nn.GroupNorm, nn.LocalResponseNorm, nn.ChannelShuffle, nn.ConvTranspose2d, nn.Identity

# Operators whose result has the format of their arguments, beside all that are element by element.
_FOLLOWING = {
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "boolean_dispatch"),
    *("interpolate", "pad", "cat", "concat", "concatenate", "clone", "detach", "batch_norm"),
    *("group_norm", "dropout", "flip", "roll", "where", "chunk", "split", "narrow", "getitem"),
    *("normalize", "pixel_shuffle", "channel_shuffle", "stochastic_depth", "dropout2d", "alpha_dropout"),
    *("float", "double", "to", "type_as", "data", "glu", "relu6", "hardtanh_", "elu_", "leaky_relu_"),
    *("rand_like", "randn_like", "zeros_like", "ones_like", "local_response_norm", "upsample"),
    *("lp_pool2d", "setitem", "select", "unbind", "hardsigmoid_"),
}
# Those whose result is contiguous whatever they are given.
_CONTIGUOUS = {
    *("softmax", "log_softmax", "instance_norm", "layer_norm", "mean", "sum", "amax", "amin", "stack"),
    *("repeat", "linear", "matmul", "mm", "bmm", "index_select", "cumsum"),
}
# Those whose result is contiguous where their argument is.
_RESHAPING = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"),
    *("reshape_as", "ravel"),
}


# Of a result that is no image.
NO_IMAGE: dict[Format, Format | None] = dict.fromkeys(FORMATS)


def note_formats(reader: Reader) -> None:
    """Notes for each node, as meta["formats"], the format of its result for inputs of either."""
    for start in FORMATS:
        found: dict[fx.Node, Format | None] = {}
        for node in reader.graph.nodes:
            found[node] = _format_of(reader, node, found, start)
            node.meta.setdefault("formats", {})[start] = found[node]


def _format_of(
    reader: Reader, node: fx.Node, found: dict[fx.Node, Format | None], start: Any
) -> Format | None:
    if node.op == "placeholder":
        return start  # type: ignore[no-any-return]
    if node.op in ("get_attr", "output"):
        return None
    given = {found[argument] for argument in node.all_input_nodes} - {None}
    common: Format | None = None
    if given:
        common = given.pop() if len(given) == 1 else "unknown"
    module = reader.module(node)
    return _of_module(module, common) if module is not None else _of_operator(reader, node, common)


def _of_module(module: nn.Module, given: Format | None) -> Format | None:
    if why_opaque(module):
        return "unknown"
    if isinstance(module, (SeparableConv2d, DepthwiseConv2d)):
        return given
    if isinstance(module, nn.Conv2d):
        return _of_convolution(module.weight, given)
    if isinstance(module, _CONTIGUOUS_MODULES):
        return "contiguous"
    following = type(module).__module__ in _FOLLOWING_FILES or isinstance(module, _FOLLOWING_MODULES)
    return given if following else "unknown"


def _of_convolution(weight: Any, given: Format | None) -> Format | None:
    """Of torch's."""
    if given == "unknown" or not isinstance(weight, Tensor):
        return "unknown"
    return "channels_last" if is_channels_last(weight) else given


def _of_operator(reader: Reader, node: fx.Node, given: Format | None) -> Format | None:
    if node.target in (F.conv2d, torch.conv2d):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        return _of_convolution(reader.constant(weight), given)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "contiguous":
        return "unknown" if node.args[1:] or node.kwargs else "contiguous"
    if name in _CONTIGUOUS:
        return "contiguous"
    if name in _RESHAPING:
        return given if given == "contiguous" else "unknown"
    if name in ("getattr", "size", "dim", "numel", "item") and node.args[1:] != ("data",):
        return None
    kind = getattr(node.target, "__module__", "") or ""
    known = node.op == "call_method" or kind.startswith(("torch", "_operator", "builtins", "math"))
    if known and (name in _FOLLOWING or is_elementwise(name)):
        return given
    return "unknown"


@functools.cache
def is_elementwise(name: str) -> bool:
    """Whether the torch operator of this name works element by element."""
    name = {"truediv": "div", "floordiv": "floor_divide", "iadd": "add", "imul": "mul"}.get(name, name)
    for spelling in (name, name.removesuffix("_"), name.removeprefix("i")):
        packet = getattr(torch.ops.aten, spelling, None) if spelling.isidentifier() else None
        overloads = [] if packet is None else [getattr(packet, kind) for kind in packet.overloads()]
        if any(torch.Tag.pointwise in overload.tags for overload in overloads):
            return True
    return False
