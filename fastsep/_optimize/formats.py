"""The memory format that each result of a module's own forward has, as far as its graph tells.

A caller of an optimized model gets results in the strides that the model's own forward gives them, whatever
layout the graph runs in.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._ops import is_channels_last
from ..depthwise import DepthwiseConv2d
from ..modules import SeparableConv2d
from .chains import Convolution, Reader, UnfitError
from .trace import why_opaque

# As torch's suggest_memory_format() has it: a slice keeps its tensor's. None: there is nothing with one.
Format = Literal["contiguous", "channels_last", "unknown"]
FORMATS: tuple[Format, Format] = ("contiguous", "channels_last")

_FOLLOWING_FILES = {f"torch.nn.modules.{name}" for name in ("dropout", "linear", "pooling")}
_CONTIGUOUS_MODULES = (
    *(nn.InstanceNorm2d, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.RReLU, nn.LayerNorm),
    nn.Unfold,
    nn.Linear,
    nn.Flatten,
)
_FOLLOWING_MODULES = nn.GroupNorm, nn.LocalResponseNorm, nn.ChannelShuffle, nn.Identity

# Operators whose result has the format of their arguments, beside all that are element by element.
_FOLLOWING = {
    *("max_pool2d", "avg_pool2d", "lp_pool2d", "group_norm", "local_response_norm", "normalize", "glu"),
    *("dropout", "dropout2d", "alpha_dropout", "stochastic_depth", "channel_shuffle", "flip", "roll"),
    *("clone", "detach", "data", "float", "double", "to", "type_as"),
    *("chunk", "split", "narrow", "getitem", "setitem", "select", "unbind"),
    *("rand_like", "randn_like", "zeros_like", "ones_like"),
}
# Element by element, though torch has no tag that says so.
_ELEMENTWISE = {"batch_norm", "elu_", "hardsigmoid_", "hardtanh_", "leaky_relu_", "relu6", "where"}
_POOLING_TO_A_SIZE = {"adaptive_avg_pool2d", "adaptive_max_pool2d", "boolean_dispatch"}
_GROWING = {"interpolate", "pad", "pixel_shuffle", "upsample"}  # which make more than a pixel of one
_GROWING_FILES = {f"torch.nn.modules.{name}" for name in ("padding", "upsampling", "pixelshuffle")}
_CONCATENATING = {"cat", "concat", "concatenate"}
# Those whose result is contiguous whatever they are given.
_REDUCING = {"mean", "sum", "amax", "amin"}
_CONTIGUOUS = {
    *("softmax", "log_softmax", "instance_norm", "layer_norm", "stack", "repeat", "linear", "matmul", "mm"),
    *("bmm", "index_select", "cumsum"),
}
# Those whose result is contiguous where their argument is.
_RESHAPING = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"),
}
_EXPANDING = {"expand", "expand_as", "broadcast_to"}


@dataclass(frozen=True)
class Seen:
    """What is known of a result.

    An image of one pixel or of one channel is dense in both formats at once, and torch tells them apart by
    the strides of the dimensions with one place. Most of its operators do not: a norm makes a channels-last
    pixel contiguous, and what is computed of that is contiguous however large it gets. Not so where the
    format `is_definite`, whatever the size. A pixel has no say in the format of what it is broadcast to.
    """

    format: Format | None
    is_pixel: bool = False
    is_definite: bool = False


_NOTHING, _UNKNOWN = Seen(None), Seen("unknown")


# Of a result that is no image.
NO_IMAGE: dict[Format, Format | None] = dict.fromkeys(FORMATS)


def note_formats(reader: Reader) -> None:
    """Notes for each node, as meta["formats"], the format of its result for inputs of either."""
    for start in FORMATS:
        found: dict[fx.Node, Seen] = {}
        for node in reader.graph.nodes:
            found[node] = _seen(reader, node, found, start)
            node.meta.setdefault("formats", {})[start] = found[node].format


def _seen(reader: Reader, node: fx.Node, found: dict[fx.Node, Seen], start: Format) -> Seen:
    if node.op == "placeholder":
        return Seen(start, is_definite=True)
    if node.op in ("get_attr", "output"):
        return _NOTHING
    given = [found[argument] for argument in node.all_input_nodes if found[argument].format is not None]
    module = reader.module(node)
    if module is not None:
        return _of_module(reader, node, module, _common(given))
    return _of_operator(reader, node, given)


def _common(given: Sequence[Seen]) -> Seen:
    """The format of all that have a say."""
    deciding = [seen for seen in given if not seen.is_pixel] or given
    formats = {seen.format for seen in deciding}
    if len(formats) != 1:
        return _UNKNOWN if formats else _NOTHING
    pixel, definite = all(seen.is_pixel for seen in given), all(seen.is_definite for seen in deciding)
    return Seen(formats.pop(), pixel, definite)


# ---- modules -----------------------------------------------------------------------------------------------


def _of_module(reader: Reader, node: fx.Node, module: nn.Module, given: Seen) -> Seen:
    file = type(module).__module__
    if why_opaque(module):
        return _UNKNOWN
    if isinstance(module, (SeparableConv2d, nn.Conv2d)):
        return _of_convolution(reader, node, getattr(module, "weight", None), given)
    if isinstance(module, _CONTIGUOUS_MODULES):
        return Seen("contiguous")
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        return Seen(given.format, module.output_size in (1, (1, 1)), given.is_definite)
    if file in _GROWING_FILES or isinstance(module, nn.ConvTranspose2d):
        return Seen(given.format, False, given.is_definite)
    if file in ("torch.nn.modules.activation", "torch.nn.modules.batchnorm"):
        return _of_elementwise(reader, node, [given])
    following = file in _FOLLOWING_FILES or isinstance(module, _FOLLOWING_MODULES)
    return given if following else _UNKNOWN


def _of_convolution(reader: Reader, node: fx.Node, weight: Tensor | None, given: Seen) -> Seen:
    """Torch's, or a layer of ours, which asks its input alone."""
    module = reader.module(node)
    if isinstance(module, (SeparableConv2d, DepthwiseConv2d)):
        weight = None
    elif weight is None:
        return _UNKNOWN
    grows = _grows(reader, node)
    format = given.format
    if weight is not None and is_channels_last(weight) and format != "unknown":
        format = "channels_last"
    elif format == "channels_last" and grows and not given.is_definite:
        format = "unknown"
    return Seen(format, given.is_pixel and not grows, is_definite=True)


def _grows(reader: Reader, node: fx.Node) -> bool:
    """Whether a convolution may make an image of one pixel or of one channel a larger one."""
    module = reader.module(node)
    try:
        if isinstance(module, SeparableConv2d):
            convolution: Convolution | None = reader.separable(node, module)[0]
        else:
            convolution = reader.convolution(node)
    except UnfitError:
        return True
    if convolution is None:
        return True
    if convolution.in_channels == 1 and convolution.weight.shape[0] > 1:
        return True
    if isinstance(convolution.padding, str):
        return False
    top, bottom, left, right = convolution.padding
    (kh, kw), (dh, dw) = convolution.weight.shape[2:], convolution.dilation
    return top + bottom > dh * (kh - 1) or left + right > dw * (kw - 1)


# ---- operators ---------------------------------------------------------------------------------------------


def _of_operator(reader: Reader, node: fx.Node, given: Sequence[Seen]) -> Seen:
    common = _common(given)
    if node.target in (F.conv2d, torch.conv2d):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        return _of_convolution(reader, node, reader.constant(weight), common)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "contiguous":
        return _UNKNOWN if node.args[1:] or node.kwargs else Seen("contiguous", common.is_pixel)
    if name in _CONTIGUOUS or name in _REDUCING:
        return Seen("contiguous", name in _REDUCING and _is_over_planes(node))
    if name in _RESHAPING or (name == "getitem" and _adds_a_plane(node)):
        return Seen("contiguous" if common.format == "contiguous" else "unknown", _adds_a_plane(node))
    if name in _EXPANDING:
        return Seen("unknown", bool(given) and given[0].is_pixel)
    if name in ("getattr", "size", "dim", "numel", "item") and node.args[1:] != ("data",):
        return _NOTHING
    kind = getattr(node.target, "__module__", "") or ""
    if node.op != "call_method" and not kind.startswith(("torch", "_operator", "builtins", "math")):
        return _UNKNOWN
    if name in _CONCATENATING:
        return Seen("contiguous") if any(seen.format == "contiguous" for seen in given) else common
    if name in _POOLING_TO_A_SIZE:
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        return Seen(common.format, size in (1, (1, 1), [1, 1]), common.is_definite)
    if name in _GROWING:
        return Seen(common.format, False, common.is_definite)
    if name in _FOLLOWING:
        return common
    return _of_elementwise(reader, node, given) if name in _ELEMENTWISE or _is_pointwise(name) else _UNKNOWN


def _of_elementwise(reader: Reader, node: fx.Node, given: Sequence[Seen]) -> Seen:
    """An activation, a norm or arithmetic."""
    if reader.writes(node):
        return given[0] if given else _UNKNOWN
    common = _common(given)
    if not common.is_pixel or common.format == "contiguous":
        return Seen(common.format, common.is_pixel)
    try:
        is_plain = reader.activation(node) is not None or _is_batch_norm(reader, node)
    except UnfitError:
        is_plain = False
    return Seen("contiguous" if is_plain else "unknown", True)


def _is_batch_norm(reader: Reader, node: fx.Node) -> bool:
    return node.target is F.batch_norm or isinstance(reader.module(node), nn.BatchNorm2d)


def _is_over_planes(node: fx.Node) -> bool:
    """Whether a reduction makes a pixel of each plane."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim")
    if not isinstance(dims, Sequence) or not all(isinstance(dim, int) for dim in dims):
        return False
    return keeps is True and {dim % 4 for dim in dims} == {2, 3}  # type: ignore[operator]


def _adds_a_plane(node: fx.Node) -> bool:
    """Whether a number becomes a plane: view(n, c, 1, 1), x[:, :, None, None], unsqueeze(2).unsqueeze(3)."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "unsqueeze":
        inner = node.args[0]
        if not isinstance(inner, fx.Node) or getattr(inner.target, "__name__", inner.target) != name:
            return False
        return (inner.args[1], node.args[1]) in ((2, 3), (-1, -1), (2, -1), (-1, 3))
    given = node.args[1:]
    if len(given) == 1 and isinstance(given[0], Sequence):
        given = tuple(given[0])
    last = (None, None) if name == "getitem" else (1, 1)
    return name in ("getitem", "view", "reshape") and len(given) > 2 and given[-2:] == last


@functools.cache
def _is_pointwise(name: str) -> bool:
    """Whether the torch operator of this name works element by element."""
    name = {"truediv": "div", "floordiv": "floor_divide", "iadd": "add", "imul": "mul"}.get(name, name)
    for spelling in (name, name.removesuffix("_"), name.removeprefix("i")):
        packet = getattr(torch.ops.aten, spelling, None) if spelling.isidentifier() else None
        overloads = [] if packet is None else [getattr(packet, kind) for kind in packet.overloads()]
        if any(torch.Tag.pointwise in overload.tags for overload in overloads):
            return True
    return False
