"""Patterns of what is around the pairs: convolutions, means, linear layers and shuffles by themselves.

As in patterns.py; one that takes more nodes in goes before those that take less.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import _native
from .chains import Reader, UnfitError
from .patterns import Match, Pattern, check_native, expansion, reads_only, tail
from .series import LinearStep, MeanStep
from .shuffles import channel_shuffle
from .steps import DenseStep, DepthwiseStep, ExpandedStep, ImageStep, PointwiseStep
from .trace import why_opaque


def expanded_depthwise(reader: Reader, node: fx.Node) -> Match | None:
    """Pointwise, or dense on an image -> [norm] -> [activation] -> depthwise -> [norm] -> [activation]."""
    convolution = reader.convolution(node)
    expand = expansion(reader, convolution)
    if expand is None or expand.next is None or not reads_only(expand.next, expand.nodes[-1]):
        return None
    depthwise = reader.convolution(expand.next)
    if (
        convolution is None
        or depthwise is None
        or not depthwise.is_depthwise
        or depthwise.weight.shape[0] != convolution.weight.shape[0]
    ):
        return None
    check_native(convolution, depthwise)
    only = tail(reader, depthwise, lenient=True)
    step = ExpandedStep(expand.convolution, expand.activation, only.convolution, only.activation)
    kind = f"depthwise behind {convolution.name}"
    return Match([*expand.nodes, *only.nodes], step, kind, depthwise, expand.convolution)


def lone_depthwise(reader: Reader, node: fx.Node) -> Match | None:
    """Depthwise -> [norm] -> [activation], with anything behind."""
    convolution = reader.convolution(node)
    if convolution is None or not convolution.is_depthwise:
        return None
    check_native(convolution)
    only = tail(reader, convolution, lenient=True)
    return Match(only.nodes, DepthwiseStep(only.convolution, only.activation), "depthwise", convolution)


def lone_pointwise(reader: Reader, node: fx.Node) -> Match | None:
    """Pointwise, of any stride -> [norm] -> [activation]."""
    convolution = reader.convolution(node)
    if convolution is None or not replace(convolution, stride=(1, 1)).is_pointwise:
        return None
    check_native(convolution)
    only = tail(reader, convolution, lenient=True)
    return Match(only.nodes, PointwiseStep(only.convolution, only.activation), "pointwise", convolution)


def gated_pointwise(reader: Reader, node: fx.Node) -> Match | None:
    """A product with factors that are made of the other factor's mean over each plane -> pointwise."""
    if node.target not in (operator.mul, torch.mul, "mul") or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    x, gate = (a, b) if _is_made_of_mean(reader, b, a) else (b, a)
    users = list(node.users)
    if not _is_made_of_mean(reader, gate, x) or len(users) != 1 or not reads_only(users[0], node):
        return None
    convolution = reader.convolution(users[0])
    if convolution is None or not replace(convolution, stride=(1, 1)).is_pointwise:
        return None
    check_native(convolution)
    only = tail(reader, convolution, lenient=True)
    step = PointwiseStep(only.convolution, only.activation, gated=True)
    return Match([node, *only.nodes], step, "gated pointwise", operands=(0, 1) if x is a else (1, 0))


def _is_made_of_mean(reader: Reader, node: fx.Node, source: fx.Node) -> bool:
    """Whether convolutions and activations lead from the mean over each plane of `source` to a node."""
    while node.args and isinstance(before := node.args[0], fx.Node) and reads_only(node, before):
        if before is source:
            mean = mean_over_plane(reader, node)
            return mean is not None and isinstance(mean.step, MeanStep) and mean.step.keeps_plane
        try:
            known = reader.convolution(node), reader.activation(node), reader.affine(node)
        except UnfitError:
            return False
        if known == (None, None, None) and not reader.is_identity(node):
            return False
        node = before
    return False


def image_convolution(reader: Reader, node: fx.Node) -> Match | None:
    """A dense convolution on an image -> [norm] -> [activation]."""
    convolution = reader.convolution(node)
    if convolution is None or convolution.is_pointwise:
        return None
    check_native(convolution)
    only = expansion(reader, convolution)
    if only is None:
        return None
    return Match(only.nodes, ImageStep(only.convolution, only.activation), "image", convolution)


def dense(reader: Reader, node: fx.Node) -> Match | None:
    """Any other convolution -> [norm] -> [activation], by torch's convolution."""
    convolution = reader.convolution(node)
    if convolution is None:
        return None
    check_native(convolution)  # other dtypes and devices are the model's own affair
    if convolution.padding == "same" and convolution.stride != (1, 1):
        raise UnfitError("its padding depends on the input")
    if (
        convolution.padding[:1] != convolution.padding[1:2]
        or convolution.padding[2:3] != convolution.padding[3:]
    ):
        raise UnfitError("its padding differs from side to side")
    only = tail(reader, convolution, lenient=True)
    return Match(only.nodes, DenseStep(only.convolution, only.activation), "dense", convolution)


def mean_over_plane(reader: Reader, node: fx.Node) -> Match | None:
    """Global average pooling, as a module, a function or a mean -> [flatten]."""
    module, given = reader.module(node), node.args[1:]
    dims: Any = (-2, -1)
    size: Any = 1
    keepdim: Any = True
    if type(module) is nn.AdaptiveAvgPool2d and not why_opaque(module) and not given:
        size = module.output_size
    elif node.target is F.adaptive_avg_pool2d and len(given) == 1 and not node.kwargs:
        (size,) = given
    elif node.target in (torch.mean, "mean") and len(given) == 1 and node.kwargs.keys() <= {"keepdim"}:
        (dims,), keepdim = given, node.kwargs.get("keepdim", False)
    else:
        return None
    plane = isinstance(dims, tuple | list) and tuple(dims) in ((2, 3), (-2, -1))
    if size not in (1, (1, 1), [1, 1]) or not plane or not isinstance(keepdim, bool):
        return None
    if _native.core is None or not isinstance(node.args[0], fx.Node):
        return None
    nodes, flatten = [node], False
    while (
        keepdim
        and not flatten
        and len(users := list(nodes[-1].users)) == 1
        and reads_only(users[0], nodes[-1])
    ):
        if _flattens(reader, users[0]):
            flatten = True
        elif not reader.is_identity(users[0]):
            break
        nodes.append(users[0])
    return Match(nodes, MeanStep(node, tuple(dims), keepdim=keepdim, flatten=flatten), "mean")


def _flattens(reader: Reader, node: fx.Node) -> bool:
    """Whether a node makes [N, C] of [N, C, 1, 1]."""
    module = reader.module(node)
    if type(module) is nn.Flatten and not why_opaque(module):
        return (module.start_dim, module.end_dim) == (1, -1) and len(node.args) == 1
    return node.target in (torch.flatten, "flatten") and node.args[1:] in ((1,), (1, -1)) and not node.kwargs


def linear(reader: Reader, node: fx.Node) -> Match | None:
    """A linear layer, which torch would stream row-major -> [activation]."""
    module = reader.module(node)
    if type(module) is not nn.Linear or why_opaque(module) or len(node.args) != 1 or node.kwargs:
        return None
    if type(module.weight) is not nn.Parameter or module.weight.dtype not in _native.DTYPES:
        return None
    if _native.core is None or module.weight.device.type != "cpu":
        return None
    nodes, activation = [node], "identity"
    while len(users := list(nodes[-1].users)) == 1 and reads_only(users[0], nodes[-1]):
        try:
            name = None if reader.is_identity(users[0]) else reader.activation(users[0])
        except UnfitError:
            break
        if name is not None and activation == "identity":
            activation = name
        elif not reader.is_identity(users[0]):
            break
        nodes.append(users[0])
    return Match(nodes, LinearStep(node, module.weight, module.bias, activation), "linear")


def shuffle(reader: Reader, node: fx.Node) -> Match | None:
    """The channel shuffle of two tensors put together."""
    found = channel_shuffle(reader, node)
    return None if found is None else Match(*found, "shuffle", operands=(0, 1))


SURROUNDINGS: Sequence[Pattern] = (
    *(expanded_depthwise, gated_pointwise, lone_depthwise, lone_pointwise, image_convolution, dense),
    *(mean_over_plane, linear, shuffle),
)
